"""Progress hears of each step, reporters of what the Trainer logs, and run.json is as it is at that step."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from runs import set_up, write_config
from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.errors import SettingsError
from tsqlora.progress import Progress
from tsqlora.record import RunRecord
from tsqlora.settings import load_config
from tsqlora.training import command as pipeline
from tsqlora.training import live_record
from tsqlora.training.live_record import LiveRecord

Logged = list[tuple[str, Any, int]]


class Writer:
    """Stands for TensorBoard's: keeps what it is given."""

    scalars: Logged = []  # noqa: RUF012  (filled by the fixture's one run)

    def __init__(self, log_dir: str) -> None: ...
    def add_text(self, *logged: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_up(tmp_path_factory.mktemp("report_to"))


def train(place: Path, name: str, *overrides: str, progress: Progress | None = None) -> RunRecord:
    logged = {"logging_strategy": "steps", "logging_steps": 2}
    training = {"epochs": 8, "learning_rate": 0.02, "batch_size": 8, **logged}
    config = write_config(place / "c.yaml", place / "model", place / "train.jsonl", training=training)
    return pipeline.train(load_config(config, ["data.max_length=16", *overrides]), place / name, progress=progress)


@pytest.mark.parametrize(
    ("reporter", "why"),
    [("nothing-like-it", r"report_to: nothing-like-it.*azure_ml"), ("wandb", r"report_to: wandb.*pip install wandb")],
)
def test_a_reporter_that_is_not_there_is_told_before_training(
    reporter: str, why: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(SettingsError, match=why):
        train(place, "refused", f"training.report_to={reporter}")
    assert not (place / "refused").exists()


@pytest.fixture(scope="module")
def watched(place: Path) -> dict[str, Any]:
    """A run with a reporter, all that it logged, and run.json as it was at every step."""
    logged: list[tuple[str, int, int, str]] = []
    records: list[dict[str, Any]] = []
    run = place / "run"

    class Board(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            self.tb_writer, self.logging_dir, self._SummaryWriter = None, None, Writer

    def progress(phase: str, done: int, total: int, note: str = "", /) -> None:
        if note:
            logged.append((phase, done, total, note))
            records.append(json.loads((run / "run.json").read_text()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_record, "EVERY", 0.0)
        patch.setattr(live_record, "SHARE", float("inf"))
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
        patch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
        record = train(place, "run", "training.report_to=tensorboard", progress=progress)
    return {"logged": logged, "records": records, "record": record, "run": run}


def test_what_the_trainer_logs_and_the_run_itself_are_as_without_reporters(
    watched: dict[str, Any], place: Path
) -> None:
    plain, reported = train(place, "plain"), watched["record"]
    assert plain.history == reported.history
    assert plain.rank_events == reported.rank_events
    losses = [value for name, value, _ in Writer.scalars if name == "train/loss"]
    assert losses == [entry["loss"] for entry in plain.history if "loss" in entry]


def test_every_step_is_told_with_what_is_known_of_it(watched: dict[str, Any]) -> None:
    logged, record = watched["logged"], watched["record"]
    assert len(logged) == record.plan["steps"]
    assert {phase for phase, *_ in logged} == {"training"}
    assert logged[-1][1] == logged[-1][2]
    assert logged[0][3].startswith("lr ")
    losses = [f"loss {entry['loss']:.4g}" for entry in record.history if "loss" in entry]
    assert logged[-2][3].split(", ")[0] in losses
    rates = [float(note.rpartition(" ")[2]) for *_, note in logged]
    assert rates[0] > rates[-1] >= 0


def test_the_record_says_how_far_the_run_is_while_it_trains(watched: dict[str, Any]) -> None:
    records, final = watched["records"], watched["record"]
    # QualityCallback comes before TellProgress: at a step its record is there.
    assert all(record["status"] == "running" for record in records)
    assert [record["now"].get("step") for record in records] == [*range(1, len(records) + 1)]
    assert [len(record["history"]) for record in records] == sorted(len(record["history"]) for record in records)
    late = records[-1]
    whole = json.loads(json.dumps(final.to_dict()))
    assert late["history"] == whole["history"][: len(late["history"])] != []
    assert late["rank_events"] == whole["rank_events"] != []
    assert late["quality"] == whole["quality"]
    assert late["ranks"] == whole["ranks"]
    assert set(late["cost"]) == {"look", "ranks", "training"}
    for phase, cost in late["cost"].items():
        assert 0 < cost["seconds"] <= whole["cost"][phase]["seconds"]
    assert records[0]["quality"]["used"] is True
    assert final.now == RunRecord.load(watched["run"]).now == {}


def test_writing_the_record_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    written: list[float] = []

    state, args = TrainerState(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    keep = LiveRecord(RunRecord("running", 0, "t", None, {}, {"steps": 1000}), tmp_path, finishes=True)

    def save() -> None:
        written.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(live_record.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(keep, "write", save)
    for state.global_step in range(1, 501):
        if keep.end_step(args, state, QualitySubset(range(8), 1.0)):
            keep.write_now(state, {"notes": [], "settings": {}})
        clock[0] += 1.0
    assert len(written) * 2.0 / clock[0] < 0.03
