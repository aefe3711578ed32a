"""A fitted head in place of a random one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tsqlora.auditing.head_start import (
    SCALE,
    WHITENED_STD,
    against_chance,
    fit_start,
    install,
    whiten,
    why_at_chance,
)
from tsqlora.errors import TsqLoraError
from tsqlora.model.forward import Head
from tsqlora.tasks.classification import Classification


class TwoLayers(nn.Module):
    """A new dense layer, tanh, and the last one; the dense layer as bad as random ones can be."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.last = nn.Linear(12, 12), nn.Linear(12, 3)
        with torch.no_grad():
            self.dense.weight.mul_(30)  # tanh saturates

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.dense(x)))


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    return (rng.normal(size=(3, 12))[labels] + rng.normal(size=(300, 12))).astype(np.float32), labels


def test_whitened_outputs_are_uncorrelated_and_of_one_spread(rows: tuple[np.ndarray, np.ndarray]) -> None:
    layer = whiten(rows[0], 12)
    outputs = rows[0] @ layer.weight.T + layer.bias
    np.testing.assert_allclose(np.cov(outputs.T, bias=True), WHITENED_STD**2 * np.eye(12), atol=1e-5)


def test_a_narrower_layer_has_the_leading_components() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 4)) * [10, 5, 0.1, 0.1]
    layer = whiten(x, 2)
    assert np.abs(layer.weight[:, 2:]).max() < np.abs(layer.weight[:, :2]).max()


def test_the_installed_head_gives_the_fitted_logits(rows: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = rows
    torch.manual_seed(0)
    model, inputs = TwoLayers(), torch.from_numpy(x)
    with torch.no_grad():
        features = torch.tanh(model.dense(inputs)).numpy()
        before = model(inputs)
    start = fit_start(
        features,
        y,
        nn.functional.cross_entropy(before, torch.from_numpy(y), reduction="none").numpy(),
        link="softmax",
        width=3,
        intercept=True,
        dense_inputs=x,
        activation="tanh",
        rng=lambda: np.random.default_rng(0),
    )
    assert start.replaces
    assert start.dense is not None  # a saturated layer says less than a whitened one
    install(Head("last", model.last, model.dense, "tanh"), start)
    with torch.no_grad():
        logits = model(inputs).double().numpy()
    features = np.tanh(x @ start.dense.weight.T + start.dense.bias)
    np.testing.assert_allclose(logits, SCALE * start.fit.head.logits(features), atol=1e-4)
    assert start.summary()["replaced"]


# --- the learned test ---

LOSSES = st.lists(st.floats(-10, 10), min_size=2, max_size=30)


def test_numbers_by_hand() -> None:
    # Differences 1, 2, 3 and -9: mean -0.75, standard deviation 5.56, standard error 2.78.
    why = why_at_chance(torch.tensor([0.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, 2.0, 4.0, 0.0]))
    assert "4 rows is 2.5000, a constant guess's is 1.7500: -0.3 standard errors" in str(why)
    assert why_at_chance(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])) is None, "3.5 errors"


@given(LOSSES, st.integers(0, 2**32))
def test_it_is_one_sided(losses: list[float], seed: int) -> None:
    chance, own = torch.randn(len(losses), generator=torch.Generator().manual_seed(seed)).double(), torch.tensor(losses)
    assert why_at_chance(own.double(), chance) or why_at_chance(chance, own.double())


def test_identical_rows_are_finitely_far_away() -> None:
    assert why_at_chance(torch.full((4,), 0.1), torch.full((4,), 0.5)) is None
    assert "-1000000000.0 standard errors" in str(why_at_chance(torch.full((4,), 0.5), torch.full((4,), 0.1)))


def test_labels_that_are_all_the_same_are_named_as_the_reason() -> None:
    why = against_chance(Classification(), torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    assert "all 5 rows have the same label" in str(why)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(TsqLoraError, match="1 of 3"):
        why_at_chance(torch.tensor([0.1, value, 0.2]), torch.ones(3))
