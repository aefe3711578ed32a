"""Features of tagged tokens: a small table needs no further pass."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForTokenClassification

from models import collate, lora, samples, tiny_bert
from tsqlora.data.batches import padded_labels
from tsqlora.quality import head_start
from tsqlora.quality.forward_pass import forward_pass
from tsqlora.quality.rule import Compute, LookRequest, ScoringRule
from tsqlora.tasks import get_task

TASK, COMPUTE = get_task("token-classification"), Compute(7)


def padded(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    made = collate([{**row, "labels": 0} for row in batch])
    labels = padded_labels([row["labels"] for row in batch], made["input_ids"].shape[1])
    return {**made, "labels": torch.from_numpy(labels)}


@pytest.mark.parametrize("whole", [True, False])
def test_losses_are_those_of_a_pass_over_all_rows_with_the_fitted_head(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = samples(40, 3)
    for row in rows:
        row["labels"] = [-100, *[token % 3 for token in row["input_ids"][1:]]]
    monkeypatch.setattr(head_start, "ROWS_OF_TAGS", 40 if whole else 20)
    if whole:
        monkeypatch.setattr(head_start, "forward_pass", lambda *_, **__: pytest.fail("a further pass"))
    model = lora(BertForTokenClassification(tiny_bert(num_labels=3).config))
    request = LookRequest(dataset=rows, collate=padded, task=TASK, rule=ScoringRule(), compute=COMPUTE)
    started = head_start.start_head(model, request)
    expected, _ = forward_pass(model, rows, padded, task=TASK, compute=COMPUTE)
    assert started.head is not None
    assert started.head.replaces
    assert started.pool is not None
    assert expected is not None
    np.testing.assert_array_equal(started.pool.labels, expected.labels)
    np.testing.assert_allclose(started.pool.loss, expected.loss, rtol=1e-5)
