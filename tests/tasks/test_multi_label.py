"""Several labels per row: the loss, its constants, and metrics against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from models import collate, samples, tiny_bert
from oracles import slow_multi_label_loss
from tsqlora.tasks import task_of
from tsqlora.tasks.multi_label import MultiLabel

TASK = MultiLabel()
SEEDS = st.integers(0, 2**32)


def batch(seed: int = 0, n: int = 40, k: int = 5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, k, generator=rng, dtype=torch.float64) - 1
    return logits, (torch.rand(n, k, generator=rng) < torch.sigmoid(logits)).double()


def test_the_loss_is_the_slow_twin_s_and_its_mean_the_models_own() -> None:
    logits, labels = batch()
    twin = [slow_multi_label_loss(z, y) for z, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(TASK.loss(logits, labels), torch.stack(twin))
    model = tiny_bert(num_labels=5, problem_type="multi_label_classification").eval()
    assert task_of(model).name == TASK.name
    rows = [{**row, "labels": y.tolist()} for row, y in zip(samples(8, 3), labels, strict=False)]
    inputs = collate(rows)
    inputs["labels"] = inputs["labels"].double()
    out = model(**inputs)
    torch.testing.assert_close(TASK.batch_loss(TASK.loss(out.logits, inputs["labels"]), inputs["labels"]), out.loss)


@given(SEEDS)
def test_no_constant_beats_chance(seed: int) -> None:
    other, labels = batch(seed)
    least = TASK.loss(TASK.chance(labels, 5).expand_as(labels), labels).mean()
    for constant in other[:8]:
        assert least <= TASK.loss(constant.expand_as(labels), labels).mean() + 1e-9


@given(SEEDS)
def test_with_offsets_mean_probabilities_are_frequencies(seed: int) -> None:
    logits, labels = batch(seed)
    labels[:, 0] = 0  # no finite offset gives this frequency
    offsets = TASK.offsets(logits, labels)
    assert offsets[0] == 0
    inner = (labels.mean(0) > 0) & (labels.mean(0) < 1)
    p = torch.sigmoid(logits + offsets).mean(0)
    torch.testing.assert_close(p[inner], labels.mean(0)[inner])
    torch.testing.assert_close(TASK.offsets(logits + 3, labels)[inner], offsets[inner] - 3)


def test_metrics_are_scikit_learn_s() -> None:
    logits, labels = (values.numpy() for values in batch())
    predicted = logits > 0
    assert TASK.metrics(logits, labels) == pytest.approx(
        {
            "micro_f1": f1_score(labels, predicted, average="micro"),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "accuracy": accuracy_score(labels, predicted),
            "loss": TASK.loss(*map(torch.from_numpy, (logits, labels))).mean().item(),
        }
    )


def test_labels_that_neither_occur_nor_are_predicted_do_not_count() -> None:
    logits, labels = (values.numpy() for values in batch())
    more = (np.hstack([logits, -np.ones((40, 3))]), np.hstack([labels, np.zeros((40, 3))]))
    assert TASK.metrics(*more)["macro_f1"] == pytest.approx(TASK.metrics(logits, labels)["macro_f1"])
    assert TASK.metrics(-np.ones((4, 2)), np.zeros((4, 2)))["micro_f1"] == 0
