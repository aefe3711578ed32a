"""Closed-form ridge regression and its leave-one-out predictions, against a fit for each row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.model import ridge as ridge_module
from tsqlora.model.ridge import fit_classes, fit_ridge, fit_temperature


def without_row(x: np.ndarray, y: np.ndarray, row: int, strength: float, intercept: bool) -> np.ndarray:
    return without(x, y, np.arange(len(x)) != row, strength, intercept, x[row])


def without(
    x: np.ndarray, y: np.ndarray, others: np.ndarray, strength: float, intercept: bool, row: np.ndarray
) -> np.ndarray:
    """The slow twin: fit on the others, predict this row."""
    mean, centre = (x[others].mean(0), y[others].mean(0)) if intercept else (0.0, 0.0)
    a, b = x[others] - mean, y[others] - centre
    weight = np.linalg.solve(a.T @ a + strength * np.eye(x.shape[1]), a.T @ b)
    return (row - mean) @ weight + centre


def problem(n: int, d: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + 1
    return x, x @ rng.normal(size=(d, k)) + rng.normal(size=(n, k))


@given(
    n=st.integers(3, 30), d=st.integers(1, 12), k=st.integers(1, 4), intercept=st.booleans(), seed=st.integers(0, 99)
)
def test_each_row_is_predicted_by_the_fit_without_it(n: int, d: int, k: int, intercept: bool, seed: int) -> None:
    x, y = problem(n, d, k, seed)
    fit = fit_ridge(x, y, intercept=intercept)
    slow = [without_row(x, y, row, fit.strength, intercept) for row in range(n)]
    np.testing.assert_allclose(fit.left_out, slow, rtol=1e-3, atol=1e-3 * np.abs(slow).max())


@given(
    n=st.integers(3, 12), d=st.integers(1, 12), k=st.integers(1, 4), intercept=st.booleans(), seed=st.integers(0, 99)
)
def test_copies_are_left_out_together(n: int, d: int, k: int, intercept: bool, seed: int) -> None:
    x, y = problem(n, d, k, seed)
    copies = np.repeat(np.arange(n), np.random.default_rng(seed).integers(1, 4, size=n))
    x, y = x[copies], y[copies] + np.random.default_rng(seed).normal(size=(len(copies), k))
    fit = fit_ridge(x, y, intercept=intercept, copies=copies)
    slow = np.stack([without(x, y, copies != own, fit.strength, intercept, x[copies == own][0]) for own in copies])
    np.testing.assert_allclose(fit.left_out, slow, rtol=1e-3, atol=1e-3 * np.abs(slow).max())


def test_the_fit_is_scikit_learns_at_its_strength() -> None:
    from sklearn.linear_model import Ridge

    x, y = problem(60, 5, 3, 0)
    fit = fit_ridge(x, y)
    theirs = Ridge(alpha=fit.strength).fit(x, y)
    np.testing.assert_allclose(fit.weight, theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(fit.bias, theirs.intercept_, rtol=1e-6)


def test_rows_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(50, 4, 2, 1)
    whole = fit_ridge(x, y)
    monkeypatch.setattr(ridge_module, "ROWS_AT_ONCE", 7)
    parts = fit_ridge(x.astype(np.float16).astype(np.float64), y)
    np.testing.assert_allclose(parts.left_out, whole.left_out, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(fit_ridge(x, y).left_out, whole.left_out, rtol=1e-5, atol=1e-6)


def test_temperature_has_the_least_loss() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 3)) * 2
    labels = np.array([rng.choice(3, p=p) for p in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.1)
    assert fit_temperature(logits * 5, labels) == pytest.approx(5, abs=0.5)


@given(n=st.integers(6, 30), d=st.integers(3, 8), k=st.integers(2, 4), seed=st.integers(0, 99))
def test_logits_of_each_row_are_of_the_fit_without_it_over_a_temperature(n: int, d: int, k: int, seed: int) -> None:
    x, _ = problem(n, d, k, seed)
    labels = np.arange(n) % k
    one_hot = np.eye(k + 1)[labels]  # the last class has no row
    strength = fit_ridge(x, one_hot).strength
    slow = np.array([without_row(x, one_hot, row, strength, True) for row in range(n)])
    logits = fit_classes(x, labels, k + 1).left_out
    assert logits.dtype == np.float32
    scaled = slow / fit_temperature(slow, labels)
    np.testing.assert_allclose(logits, scaled, rtol=1e-2, atol=1e-2 * np.abs(scaled).max())
