"""Scoring alone: it goes on after a kill, gives the same bytes, and scores as a training run does."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import make_rows, set_up, write_jsonl
from tsqlora.auditing import look as looking
from tsqlora.auditing.scores import Scores
from tsqlora.errors import DataError, SettingsError
from tsqlora.model import passes
from tsqlora.paper import second_pass
from tsqlora.settings import load_config
from tsqlora.training import job
from tsqlora.training.command import train
from tsqlora.training.score import score_rows

Killer = Callable[[pytest.MonkeyPatch], Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_up(tmp_path_factory.mktemp("scoring"), quality={"preset": "paper"})


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    train(load_config(place / "c.yaml"), place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def undisturbed(place: Path, run: Path) -> dict[str, bytes]:
    files = {}
    for source in ("c.yaml", "run"):
        score_rows(place / source, place / f"{source}.parquet")
        files[source] = (place / f"{source}.parquet").read_bytes()
    return files


@pytest.fixture(autouse=True)
def _no_work_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "FLUSH_SECONDS", 0.0)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(phase: str, rows: int) -> Killer:
    """Kills when so much of a phase is done."""
    return lambda _: lambda name, done, total, *_: die() if (name, done) == (phase, rows) else None


def before(owner: Any, name: str) -> Killer:
    """Kills where a function would be called."""
    return lambda patch: patch.setattr(owner, name, die)


def killed(source: Path, out: Path, killer: Killer) -> None:
    """Scores in another process, which is killed."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                score_rows(source, out, progress=killer(patch))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before it was killed"
    assert not out.exists()


MOMENTS = {
    "reading": before(job, "prepare"),
    "reference": before(second_pass, "measure_reference"),
    "first batch": at("scoring", 8),
    "last batch": at("scoring", 72),
    "writing": before(Scores, "save"),
    "in the look": at("look", 8),
    "end of the look": at("look", 72),
}


@pytest.mark.parametrize(
    ("source", "moment"),
    [
        *(("run", moment) for moment in ("reading", "reference", "first batch", "writing")),
        *(("c.yaml", moment) for moment in ("in the look", "end of the look", "last batch")),
    ],
)
def test_a_killed_scoring_gives_the_same_bytes(
    source: str, moment: str, place: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "s.parquet"
    killed(place / source, out, MOMENTS[moment])
    score_rows(place / source, out)
    assert out.read_bytes() == undisturbed[source]
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_what_was_done_is_not_done_again(place: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "s.parquet", list[tuple[str, int]]()
    killed(place / "c.yaml", out, at("scoring", 16))
    score_rows(place / "c.yaml", out, progress=lambda name, done, total, *_: seen.append((name, done)))
    assert seen == [("scoring", rows) for rows in range(16, 73, 8)]  # and nothing of the look


def test_a_config_is_scored_as_its_training_run_scores(place: Path, run: Path, undisturbed: dict[str, bytes]) -> None:
    ours, trained = Scores.load(place / "c.yaml.parquet"), Scores.load(run / "scores.parquet")
    assert ours.hashes == trained.hashes
    for name, values in trained.predictions.items():
        np.testing.assert_allclose(ours.predictions[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_second_scoring_into_the_same_file_is_refused(place: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(*_: Any) -> None:
        if not refused:
            with pytest.raises(SettingsError) as error:
                score_rows(place / "c.yaml", tmp_path / "s.parquet")
            refused.append(str(error.value))

    score_rows(place / "c.yaml", tmp_path / "s.parquet", progress=meanwhile)
    assert refused == [
        f"another process is scoring into {tmp_path / 's.parquet'}; wait for it, or choose another --out"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_rows_that_are_held_out_are_told_and_of_another_file_there_are_none(
    place: Path, run: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for source in ("c.yaml", "run"):
        assert Scores.load(place / f"{source}.parquet").record.held_out == 8
    shard = write_jsonl(tmp_path / "shard.jsonl", make_rows(50))
    override = f"data.train={shard}"
    scores = score_rows(run, tmp_path / "s.parquet", overrides=[override])
    assert (len(scores), scores.record.held_out) == (50, 0)


def test_another_file_is_read_by_the_runs_columns(
    place: Path, run: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Though it has another usual column."""
    plain = make_rows(50)  # which the model has learned
    own, more = (tmp_path / f"{name}.jsonl" for name in ("own", "more"))
    write_jsonl(own, plain)
    write_jsonl(more, [{"sentence": "bad", **row} for row in plain])
    one, other = (
        score_rows(run, tmp_path / f"{file.stem}.parquet", overrides=[f"data.train={file}"]) for file in (own, more)
    )
    assert one.hashes == other.hashes
    assert np.array_equal(one.terms["loss"], other.terms["loss"])
    lacking = write_jsonl(tmp_path / "lacking.jsonl", [{"sentence": "bad", "label": 1}])
    with pytest.raises(DataError, match=r"lacking\.jsonl has no column 'text'"):
        score_rows(run, tmp_path / "s.parquet", overrides=[f"data.train={lacking}"])


def test_what_cannot_be_scored_is_refused_before_the_look(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "start_head", lambda *_, **__: pytest.fail("it looked"))
    with pytest.raises(SettingsError, match=r"quality\.enabled"):
        score_rows(place / "c.yaml", tmp_path / "s.parquet", overrides=["quality.enabled=false"])


def test_an_error_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    broken = write_jsonl(tmp_path / "data" / "broken.jsonl", [*make_rows(20), *[{"text": " ", "label": 1}] * 2])
    with pytest.raises(DataError, match="no text"):
        score_rows(place / "c.yaml", tmp_path / "s.parquet", overrides=[f"data.train={broken}"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_several_processes_are_refused_before_anything_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="2; start one"):
        score_rows(place / "c.yaml", tmp_path / "scores.parquet")
    assert not list(tmp_path.iterdir())


def test_only_the_terms_that_the_rule_weighs_are_measured(
    place: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    phases, out, override = list[str](), tmp_path / "s.parquet", ["quality.preset=default"]
    scores = score_rows(place / "c.yaml", out, overrides=override, progress=lambda name, *_: phases.append(name))
    assert scores.terms.keys() == {"loss", "el2n"}
    assert set(phases) == {"look"}
    measured = Scores.load(place / "c.yaml.parquet").terms.keys() - scores.terms.keys()
    assert measured == {"gradient_norm", "loss_reduction", "convergence", "cosine"}
