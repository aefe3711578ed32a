"""Logits in the samples' order, the same for every batch size, from a model that is left alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

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


@pytest.fixture(scope="module")
def model() -> BertForSequenceClassification:
    return tiny_bert()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_each_row_has_its_own_logits_whatever_the_batches(
    batch_size: int, model: BertForSequenceClassification
) -> None:
    model.eval()
    with torch.no_grad():
        alone = [
            model(**unlabelled([{"input_ids": r["input_ids"], "attention_mask": r["attention_mask"]}])) for r in ROWS
        ]
    expected = np.concatenate([output.logits.numpy() for output in alone])
    np.testing.assert_allclose(
        predict_logits(model, ROWS, unlabelled, task=TASK, compute=Compute(batch_size)), expected, atol=1e-12
    )


def test_dropout_is_off_and_the_mode_stays(model: BertForSequenceClassification) -> None:
    model.train()
    first, second = (predict_logits(model, ROWS, unlabelled, task=TASK, compute=Compute(4)) for _ in range(2))
    assert (first == second).all()
    assert model.training


def test_progress_ends_at_the_number_of_rows(model: BertForSequenceClassification) -> None:
    updates: list[tuple[str, int, int]] = []
    compute = Compute(4, progress=lambda *args: updates.append(args))
    predict_logits(model, ROWS, unlabelled, task=TASK, phase="test", compute=compute)
    assert updates == [("test", 0, 11), ("test", 4, 11), ("test", 8, 11), ("test", 11, 11)]


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = tiny_bert()
    with torch.no_grad():
        broken.classifier.bias.fill_(torch.nan)
    with pytest.raises(TsqLoraError, match=r"not finite for 11 of 11 rows; lower training\.learning_rate"):
        predict_logits(broken, ROWS, unlabelled, task=TASK, compute=Compute(4))
