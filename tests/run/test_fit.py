"""One training of a job: what is measured at its end."""

from types import SimpleNamespace
from typing import Any

import pytest

from tsqlora.data.samples import TokenisedSplit
from tsqlora.run import fit
from tsqlora.training.record import RunRecord


def test_rows_that_are_trained_on_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train", "trusted", "validation", "test")
    samples = {name: TokenisedSplit([{"input_ids": [j], "labels": 0}], ("h",), 0) for j, name in enumerate(names)}
    predictor = SimpleNamespace(metrics=lambda rows, **_: {"first": rows[0]["input_ids"][0]})
    monkeypatch.setattr(fit, "predictor_of", lambda *_: predictor)
    job: Any = SimpleNamespace(data=SimpleNamespace(samples=samples, splits=SimpleNamespace(format=None)))
    args: Any = None
    record = RunRecord("running", 0, "sequence-classification", None, {}, {})
    fit.measure(job, args, record, args, None)
    assert record.metrics == {"validation": {"first": 2}, "test": {"first": 3}}
