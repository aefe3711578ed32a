"""A run that trains is served to this machine alone, as its files are now, whatever state they are in."""

import http.client
from pathlib import Path

import pytest

from made_runs import make_comparison, make_run
from runs import make_rows
from seen import Seen
from serving import serving
from tsqlora.errors import DataError, SettingsError
from tsqlora.reports import gather
from tsqlora.reports.watch import Watched, make_server, serve
from tsqlora.training.record import RunRecord

ROWS = make_rows(60, labels=("no", "yes"))
NOW = {"phase": "training", "step": 30, "time": 1_700_000_000}


def ask(port: int, path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def change(run: Path, **changes: object) -> None:
    record = RunRecord.load(run)
    for name, value in changes.items():
        setattr(record, name, value)
    record.save(run)


def test_the_page_says_how_far_the_run_is_and_is_new_when_the_run_has_gone_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=ROWS, status="running", now=NOW, metrics={})
    with serving(run) as port:
        status, headers, text = ask(port)
        assert status == 200
        assert Seen(text).texts["dd"][0].split("\n") == [
            "75%step 30 of 40, training",
            "as of 22:13:20 UTC",
            "validation loss 0.500validation accuracy 80.0%",
        ]
        assert ask(port, **{"If-None-Match": headers["ETag"]})[0] == 304
        change(run, now=NOW | {"step": 36})
        status, _, text = ask(port, **{"If-None-Match": headers["ETag"]})
        assert (status, "90%" in Seen(text).texts["dl"][0]) == (200, True)
        change(run, now={}, status="finished", metrics={"test": {"accuracy": 0.5}})
        assert Seen(ask(port)[2]).texts["dt"][0] == "Test accuracy"


def test_plotly_and_the_page_are_all_that_is_served_and_only_under_its_own_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=ROWS)
    with serving(run) as port:
        assert "plotly.js" in ask(port, "/plotly.js")[2][:1000]
        for path in ("/run.json", "/../run.json", "/scores.parquet", "/?"):
            assert ask(port, path)[0] == 404
        assert ask(port, Host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1"):
            assert ask(port, Host=host)[0] == 403
        seen = Seen(ask(port)[2])
        assert [f["src"] for tag, f in seen.tags if tag == "script" and "src" in f] == ["/plotly.js"]
        policy = next(f["content"] for t, f in seen.tags if f.get("http-equiv") == "Content-Security-Policy")
        assert str(policy).startswith("default-src 'none'; script-src 'self' 'unsafe-inline'")
        assert str(policy).endswith("; connect-src 'self'")


def test_it_waits_for_a_run_that_has_not_begun_and_outlasts_files_that_cannot_be_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(run) as port:
        assert "has no run yet" in Seen(ask(port)[2]).texts["p"][-2]
        make_run(tmp_path, status="running")
        assert "begun" in Seen(ask(port)[2]).texts["dl"][0]
        (run / "run.json").write_text("broken")
        assert "not a run's record" in " ".join(Seen(ask(port)[2]).texts["p"])


def test_what_has_not_happened_yet_is_said_to_come(tmp_path: Path) -> None:
    run = make_run(tmp_path, events=0, history=[], status="running", quality={"enabled": True, "used": False})
    (run / "config.yaml").write_text("ranks:\n  policy: tsqlora\n")
    with serving(run) as port:
        page = " ".join(Seen(ask(port)[2]).texts["p"])
    for text in ("Nothing is logged yet", "Rows are not scored yet", "Ranks have not moved yet"):
        assert text in page


def test_scores_are_read_once_however_often_the_record_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, rows=ROWS, status="running", now=NOW)
    read: list[Path] = []
    read_scores = gather.read_scores
    monkeypatch.setattr(gather, "read_scores", lambda path: read.append(path) or read_scores(path))
    watched = Watched(run)
    for step in range(31, 36):
        change(run, now=NOW | {"step": step})
        watched.page()
    assert len(read) == 1


def test_wrong_uses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--watch"):
        serve(make_comparison(tmp_path), say=print)
    run = make_run(tmp_path / "2", status="running")
    with make_server(Watched(run), 0) as server:
        assert server.server_address[0] == "127.0.0.1", "no other machine can ask"
    with pytest.raises(DataError, match="control"):
        serve(run, control=run, say=print)
    with serving(run) as port, pytest.raises(SettingsError, match=rf"--port {port}"):
        serve(run, port=port, say=print)
    with pytest.raises(SettingsError, match="--port 65536"):
        serve(run, port=65536, say=print)
