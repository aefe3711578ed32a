"""One training of a job: its arguments, and what is measured at its end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runs import make_rows, write_jsonl
from tables import read_as, table_with
from tsqlora.record import RunRecord
from tsqlora.rows.splits import read_data
from tsqlora.settings import Config
from tsqlora.tasks import get_task
from tsqlora.training import run as fit


def test_rows_that_are_trained_on_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train", "trusted", "validation", "test")
    tables = {name: table_with([{"input_ids": [j], "labels": 0}]) for j, name in enumerate(names)}
    first = lambda rows, **_: {"first": rows[0]["input_ids"][0]}  # noqa: E731
    predictor = SimpleNamespace(metrics=first, text_metrics=lambda *_, **__: {})
    monkeypatch.setattr(fit, "predictor_of", lambda *_: predictor)
    job: Any = SimpleNamespace(data=tables, task=get_task("regression"))
    args: Any = None
    record = RunRecord("running", 0, "sequence-classification", None, {}, {})
    fit.measure(job, record, args, None)
    assert record.metrics == {"validation": {"first": 2}, "test": {"first": 3}}


def test_saving_the_best_checkpoint_alone_evaluates_every_epoch(tmp_path: Path) -> None:
    def args_of(**training: Any) -> Any:
        sections = {"model": {"path": "m"}, "data": {"train": "t"}, "training": {"save_strategy": "best", **training}}
        return fit.arguments(Config.model_validate(sections), tmp_path)

    alone, own = args_of(), args_of(metric_for_best_model="accuracy", eval_strategy="steps", eval_steps=5)
    assert (alone.eval_strategy, alone.metric_for_best_model, alone.greater_is_better) == ("epoch", "loss", False)
    assert (own.eval_strategy, own.metric_for_best_model) == ("steps", "accuracy")


@pytest.mark.parametrize(
    ("evident", "own_file", "says"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_metrics_of_held_out_rows_say_how_wrong_their_labels_are(
    evident: bool, own_file: bool, says: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", make_rows(40)))
    data = read_data(path, path if own_file else None, None, validation_fraction=0.2, seed=0, **read_as("class"))
    predictor = SimpleNamespace(metrics=lambda *_, **__: {"accuracy": 0.85, "loss": 0.4})
    monkeypatch.setattr(fit, "predictor_of", lambda *_: predictor)
    record = RunRecord("training", 0, "sequence-classification", [0, 1], {}, {})
    record.quality = {"looks": [{"noise": {"evident": evident, "rate": 0.1 if evident else 0.0, "low": 0, "high": 1}}]}
    job: Any = SimpleNamespace(data=data, task=get_task("regression"))
    fit.measure(job, record, SimpleNamespace(), None)  # pyright: ignore[reportArgumentType]
    assert any("accuracy 0.850" in note and "10% of their labels" in note for note in record.notes) == says
