import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tsqlora.tasks.regression import Regression

TASK = Regression()
SEEDS = st.integers(0, 2**32)


def batch(seed: int = 0, n: int = 20) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    return logits, 3 + 0.5 * logits[:, 0] + torch.randn(n, generator=rng, dtype=torch.float64)


def test_the_loss_is_the_squared_error_of_each_sample() -> None:
    whole = torch.tensor([4, 3])
    assert (TASK.loss(torch.tensor([[1.0], [2.0]]), whole).tolist(), TASK.chance(whole, 1)) == ([9.0, 1.0], 3.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_out_has_the_dtype_that_goes_in(dtype: torch.dtype) -> None:
    logits, labels = batch()
    assert {of(logits.to(dtype), labels.float()).dtype for of in (TASK.loss, TASK.offsets)} == {dtype}
    assert TASK.chance(labels.to(dtype), 1).dtype == dtype


@given(SEEDS)
def test_no_constant_beats_chance(seed: int) -> None:
    other, labels = batch(seed)
    least = TASK.loss(TASK.chance(labels, 1).expand(len(labels), 1), labels).mean()
    for constant in other:
        assert least <= TASK.loss(constant.expand(len(labels), 1), labels).mean() + 1e-12


@given(SEEDS)
def test_with_offsets_residuals_sum_to_zero(seed: int) -> None:
    logits, labels = batch(seed)
    shifted = logits + TASK.offsets(logits, labels)
    assert abs((shifted[:, 0] - labels).sum().item()) < 1e-10


def test_metrics_are_scipy_s_by_their_plain_names() -> None:
    logits, labels = (values.numpy() for values in batch())
    error = float(((logits[:, 0] - labels) ** 2).mean())
    assert TASK.metrics(logits, labels) == pytest.approx(
        {
            "pearson": stats.pearsonr(logits[:, 0], labels)[0],
            "spearman": stats.spearmanr(logits[:, 0], labels)[0],
            "mse": error,
            "loss": error,
        }
    )


@pytest.mark.parametrize("noise", [0.0, 1e-15])
def test_constant_predictions_have_correlation_zero_without_a_warning(noise: float) -> None:
    labels = batch()[1].numpy()
    logits = 0.7 + noise * np.arange(20.0)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for result in (TASK.metrics(logits, labels), TASK.metrics(labels[:, None], logits[:, 0])):
            assert (result["pearson"], result["spearman"]) == (0.0, 0.0)
            assert result["mse"] > 0
        assert TASK.metrics(np.zeros((1, 1)), np.ones(1))["pearson"] == 0.0
