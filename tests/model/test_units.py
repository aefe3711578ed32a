"""Features of tagged tokens: a small table needs no further pass."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForTokenClassification

from models import collate, lora, samples, tiny_bert
from tsqlora.auditing import head_start
from tsqlora.model.forward import forward_pass
from tsqlora.model.request import Compute, LookRequest, ScoringRule
from tsqlora.model.units import token_units
from tsqlora.rows.batches import padded_labels
from tsqlora.tasks import get_task

TASK, COMPUTE = get_task("token-classification"), Compute(7)


def padded(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    made = collate([{**row, "labels": 0} for row in batch])
    labels = padded_labels([row["labels"] for row in batch], made["input_ids"].shape[1])
    return {**made, "labels": torch.from_numpy(labels)}


def tagged(count: int) -> list[dict[str, Any]]:
    rows = samples(count, 3)
    for row in rows:
        row["labels"] = [-100, *[token % 3 for token in row["input_ids"][1:]]]
    return rows


def test_tokens_are_numbered_and_batches_split_where_memory_is_short() -> None:
    rows, model = tagged(20), BertForTokenClassification(tiny_bert(num_labels=3).config)
    tried: list[int] = []

    def short(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return padded(batch)

    every = np.arange(20)
    whole = token_units(model, rows, every, padded, task=TASK, compute=COMPUTE)
    split = token_units(model, rows, every, short, task=TASK, compute=COMPUTE, without=1)
    assert whole is not None
    assert split is not None
    some = whole[1].labels != 1
    for name in ("labels", "rows", "numbers"):
        np.testing.assert_array_equal(getattr(split[1], name), getattr(whole[1], name)[some])
    np.testing.assert_allclose(split[1].features, whole[1].features[some], atol=1e-5)
    tags = [rows[j]["labels"][number + 1] for j, number in zip(whole[1].rows, whole[1].numbers, strict=True)]
    assert tags == whole[1].labels.tolist()
    assert max(tried[-10:]) <= 2, "a size that did not fit is not tried again"


@pytest.mark.parametrize("whole", [True, False])
def test_losses_are_those_of_a_pass_over_all_rows_with_the_fitted_head(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tagged(40)
    monkeypatch.setattr(head_start, "ROWS_OF_TAGS", 40 if whole else 20)
    if whole:
        monkeypatch.setattr(head_start, "forward_pass", lambda *_, **__: pytest.fail("a further pass"))
    torch.manual_seed(0)
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
