"""What a prediction tells, and what it refuses; that its logits are each row's own is in test_predict.py."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models import collate, samples, tiny_bert
from tsqlora.errors import TsqLoraError
from tsqlora.model.request import Compute
from tsqlora.tasks import get_task
from tsqlora.training.predictions import predict_logits

TASK, ROWS = get_task("sequence-classification"), samples(11, 3)


def unlabelled(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """As `collate`, of rows that must have no labels."""
    assert all("labels" not in row for row in rows)
    batch = collate([{**row, "labels": 0} for row in rows])
    return {name: value for name, value in batch.items() if name != "labels"}


def test_progress_ends_at_the_number_of_rows() -> None:
    updates: list[tuple[str, int, int]] = []
    compute = Compute(4, progress=lambda *args: updates.append(args))
    predict_logits(tiny_bert(), ROWS, unlabelled, task=TASK, phase="test", compute=compute)
    assert updates == [("test", 0, 11), ("test", 4, 11), ("test", 8, 11), ("test", 11, 11)]


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = tiny_bert()
    with torch.no_grad():
        broken.classifier.bias.fill_(torch.nan)
    with pytest.raises(TsqLoraError, match=r"not finite for 11 of 11 rows; lower training\.learning_rate"):
        predict_logits(broken, ROWS, unlabelled, task=TASK, compute=Compute(4))
