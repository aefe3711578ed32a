"""Metrics on held-out rows come with the share of wrong labels that the look estimates, where it has evidence."""

from types import SimpleNamespace
from typing import Any

import pytest

from runs import make_rows, write_jsonl
from tables import read_as
from tsqlora.data.splits import read_data
from tsqlora.run import fit
from tsqlora.training.record import RunRecord


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
    job: Any = SimpleNamespace(data=data)
    fit.measure(job, record, SimpleNamespace(), None)  # pyright: ignore[reportArgumentType]
    assert any("accuracy of 0.850" in note and "10% of their labels" in note for note in record.notes) == says
