"""One training of a job: its arguments, and what is measured at its end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tables import table_with
from tsqlora.run import fit
from tsqlora.run.config import Config
from tsqlora.training.record import RunRecord


def test_rows_that_are_trained_on_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train", "trusted", "validation", "test")
    tables = {name: table_with([{"input_ids": [j], "labels": 0}]) for j, name in enumerate(names)}
    first = lambda rows, **_: {"first": rows[0]["input_ids"][0]}  # noqa: E731
    predictor = SimpleNamespace(metrics=first, text_metrics=lambda *_, **__: {})
    monkeypatch.setattr(fit, "predictor_of", lambda *_: predictor)
    job: Any = SimpleNamespace(data=tables)
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
