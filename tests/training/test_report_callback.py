"""Reporters hear of ranks and scores when they change, as of the Trainer's own logs, and nothing else changes."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.errors import SettingsError
from tsqlora.ranks.events import MOST_EVENTS, RankEvent, bounded
from tsqlora.run import train as pipeline
from tsqlora.run.config import load_config
from tsqlora.training import report_callback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord
from tsqlora.training.report_callback import ReportCallback

Told = list[tuple[str, Any, int]]


class Writer:
    """Stands for TensorBoard's: keeps what it is given."""

    scalars: Told = []  # noqa: RUF012  (filled by the fixture's one run)

    def __init__(self, log_dir: str) -> None: ...
    def add_text(self, *told: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report_to")
    save_checkpoint(place / "model")
    write_jsonl(place / "train.jsonl", make_rows(80))
    return place


def train(place: Path, name: str, *overrides: str) -> RunRecord:
    logged = {"logging_strategy": "steps", "logging_steps": 3}
    training = {"epochs": 8, "learning_rate": 0.02, "batch_size": 8, **logged}
    config = write_config(place / "c.yaml", place / "model", place / "train.jsonl", training=training)
    return pipeline.train(load_config(config, ["data.max_length=16", *overrides]), place / name)


@pytest.fixture(scope="module")
def reported(place: Path) -> Iterator[RunRecord]:
    class Board(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            self.tb_writer, self.logging_dir, self._SummaryWriter = None, None, Writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
        patch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
        yield train(place, "reported", "training.report_to=tensorboard")


def test_each_adjustment_is_told_at_its_step(reported: RunRecord) -> None:
    assert len(reported.rank_events) > 2
    moved = {step: value for name, value, step in Writer.scalars if name == "train/ranks/moved"}
    # The first ranks are set before a step, and told after it.
    assert moved == {e.step + (e.reason == "start"): e.moved for e in reported.rank_events}
    last = reported.rank_events[-1]
    values = {name: value for name, value, step in Writer.scalars if step == last.step}
    for layer, rank in last.ranks.items():
        assert values[f"train/rank/{layer}"] == rank
        assert values[f"train/sensitivity/{layer}"] == last.sensitivity[layer]
    assert values["train/ranks/parameters"] == last.used


def test_a_scoring_is_told_once(reported: RunRecord) -> None:
    told = [(value, step) for name, value, step in Writer.scalars if name == "train/quality/left_out"]
    assert told == [(0, reported.quality["scores"]["step"] + 1)]
    assert "train/quality/wrong_labels" in {name for name, *_ in Writer.scalars}


def test_adjustments_are_reported_also_after_older_ones_were_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_log(self, args: Any, state: TrainerState, *_: Any, **told: Any) -> None:
            assert told["logs"]["ranks/parameters"] == state.global_step
            self.steps.append(state.global_step)

    monkeypatch.setattr(report_callback, "reporter_kinds", lambda names: (Reporter,))
    reporter, ranks, args = Reporter(), RankCallback(), SimpleNamespace(report_to=["x"])
    ranks.loop = cast(Any, SimpleNamespace(events=[]))
    callbacks = SimpleNamespace(callbacks=[ranks, reporter])
    callback = ReportCallback(cast(Any, SimpleNamespace(callback_handler=callbacks, args=args)))
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(cast(Any, args), state, control)
    for step in range(1, 2 * MOST_EVENTS):
        state.global_step = step
        event = RankEvent(step, "adjustment", {"a": 4}, {"a": 4}, {"a": 1.0}, 1, step, step)
        ranks.loop.events = bounded([*ranks.loop.events, event])
        callback.on_step_end(cast(Any, args), state, control, model=None)
    assert reporter.steps == list(range(1, 2 * MOST_EVENTS))


def test_what_the_trainer_logs_and_the_run_itself_are_as_without_reporters(reported: RunRecord, place: Path) -> None:
    plain = train(place, "plain")
    assert plain.history == reported.history
    assert plain.rank_events == reported.rank_events
    losses = [value for name, value, _ in Writer.scalars if name == "train/loss"]
    assert losses == [entry["loss"] for entry in plain.history if "loss" in entry]


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
