"""No command replaces a file that it reads, under whatever name; one that it wrote before it does replace."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from runs import make_rows, run_cli, set_up, write_jsonl
from tsqlora.cli.commands import main
from tsqlora.errors import SettingsError
from tsqlora.files import reading, writing


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its settings, its data (with a trusted file), and scores."""
    folder = set_up(tmp_path_factory.mktemp("outputs"), rows=60, training={"epochs": 1})
    write_jsonl(folder / "trusted.jsonl", make_rows(8, seed=5))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for command in (
            "train c.yaml --out run --set data.trusted=trusted.jsonl",
            "score c.yaml --out scores.parquet",
            "audit train.jsonl --model model --out audit",
        ):
            with patch("sys.argv", ["tsqlora", *command.split()]), pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code, command
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, whose run and settings name its own files."""
    shutil.copytree(finished, tmp_path / "here")
    for path in (*tmp_path.rglob("c.yaml"), *tmp_path.rglob("config.yaml"), *tmp_path.rglob("audit.json")):
        path.write_text(path.read_text().replace(str(finished), str(tmp_path / "here")))
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "data").mkdir()
    for name in ("train", "test"):
        shutil.copy("train.jsonl", f"data/{name}.jsonl")
    return tmp_path / "here"


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


REPLACING = [
    ("predict run --data train.jsonl", "train.jsonl"),
    ("predict run --data data", "data/test.jsonl"),
    ("score c.yaml", "c.yaml"),
    ("score c.yaml", "train.jsonl"),
    ("score c.yaml", "model/config.json"),
    ("score c.yaml", "model/model.safetensors"),
    ("score c.yaml --set data.train=data", "data/train.jsonl"),
    ("score c.yaml --set data.trusted=trusted.jsonl", "trusted.jsonl"),
    ("score c.yaml --set adapter.init_from=run --set ranks.policy=fixed", "run/adapter/adapter_config.json"),
    ("score run", "run/run.json"),
    ("score run", "run/config.yaml"),
    ("score run", "run/adapter/adapter_model.safetensors"),
    ("select scores.parquet --fraction 0.5 --data train.jsonl", "train.jsonl"),
    ("select scores.parquet --fraction 0.5", "scores.parquet"),
    ("report run", "train.jsonl"),
    ("report run", "trusted.jsonl"),
    ("report run", "run/run.json"),
    ("report run", "run/scores.parquet"),
    ("train c.yaml", "."),
    ("train run/config.yaml", "run"),
    ("export run --format peft", "run/adapter"),
    ("export run/adapter --format peft", "run/adapter"),
    ("audit c.yaml", "c.yaml"),
    ("audit train.jsonl --model model", "audit"),
    ("demo", "."),
    ("init", "c.yaml"),
]


@pytest.mark.parametrize(("command", "out"), REPLACING, ids=lambda text: text)
def test_an_input_is_never_replaced(command: str, out: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(place)
    code, _, error = run_cli(capsys, *command.split(), "-o" if command == "init" else "--out", out)
    assert code == 2, error
    assert out in error.replace(f"{place}/", "").replace(str(place), ".")
    assert contents(place) == before


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("command", ["predict run --data train.jsonl", "report run"])
def test_a_link_to_an_input_is_the_input(
    command: str, link: Callable[..., None], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link(place / "train.jsonl", place / "link.jsonl")
    before = contents(place)
    code, _, error = run_cli(capsys, *command.split(), "--out", "link.jsonl")
    assert (code, contents(place)) == (2, before)
    assert "link.jsonl would replace" in error


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("audit --apply audit/trusted.jsonl --out audit", "trusted.jsonl"),
        ("audit --apply audit/t.jsonl", "corrected.jsonl"),
    ],
)
def test_corrections_replace_neither_their_table_nor_the_audited_file(
    command: str, name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = place / "audit"
    if name == "corrected.jsonl":
        shutil.move(place / "train.jsonl", audit / name)
        about = (audit / "audit.json").read_text().replace("train.jsonl", f"audit/{name}")
        (audit / "audit.json").write_text(about)
    first = json.loads((place / "data" / "train.jsonl").read_text().splitlines()[0])
    table = audit / command.split()[2].removeprefix("audit/")
    write_jsonl(table, [{"row": 0, "label": str(first["label"]), "reviewed_label": "1"}])
    before = contents(place)
    code, _, error = run_cli(capsys, *command.split())
    assert (code, contents(place)) == (2, before), error
    assert f"{name} would replace" in error


@pytest.mark.parametrize(
    "command", ["predict run --data train.jsonl", "score c.yaml", "select scores.parquet --fraction 0.5"]
)
def test_an_earlier_output_is_replaced(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "run" / "out.jsonl"
    for _ in range(2):
        assert run_cli(capsys, *command.split(), "--out", out)[0] == 0
        assert out.stat().st_size
    assert run_cli(capsys, "report", "run", "--out", "run/report.html")[0] == 0


def test_refusals_end_with_the_command(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    with writing(path), pytest.raises(SettingsError, match="would replace"):
        reading(path)
    reading(path)
