"""A fitted head in place of a random one."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tsqlora.quality.forward_pass import Forward, Head
from tsqlora.quality.head_start import SCALE, WHITENED_STD, HeadStart, fit_start, fit_trusted, install, whiten


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
        kind="classes",
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


@pytest.mark.parametrize("replaces", [True, False])
def test_a_head_of_trusted_rows_has_the_dense_layer_that_its_features_are_of(
    replaces: bool, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    x, y = rows
    options: dict[str, Any] = {
        "kind": "classes",
        "width": 3,
        "intercept": True,
        "rng": lambda: np.random.default_rng(0),
    }
    fit = fit_start(x, y, np.ones(300), **options).fit
    start = HeadStart(fit, 1.0, replaces, whiten(x, 12))
    apart = Forward(y, np.ones(300), np.zeros((300, 3)), x)
    assert (fit_trusted(start, x, apart, **options).dense is not None) == replaces
