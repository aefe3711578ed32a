import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tsqlora.errors import SettingsError
from tsqlora.model.terms import CLIP, Measured, Term, get_terms, quality, standardise

VALUES = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e3, 1e3, width=32))
ONE = np.zeros(5, dtype=np.int64)


def measured(**changes: object) -> Measured:
    """Two samples: gradient norms 5 and 0, ‖ḡ‖ = 2."""
    defaults = {
        "logits": torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]),
        "labels": torch.tensor([0, 1]),
        "loss": torch.tensor([0.7, 1.4]),
        "norm_sq": torch.tensor([25.0, 0.0]),
        "dot": torch.tensor([-6.0, 0.0]),
        "reference_norm": 2.0,
        "stepped_loss": torch.tensor([0.5, 1.5]),
    }
    return Measured(**defaults | changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gradient_norm", [5.0, 0.0]),
        ("loss_reduction", [0.2, -0.1]),
        ("convergence", [-3.0, 0.0]),
        ("cosine", [-0.6, 0.0]),
        ("loss", [0.7, 1.4]),
        ("el2n", [0.5 * math.sqrt(2), 0.75 * math.sqrt(2)]),
    ],
)
def test_terms_by_hand(name: str, expected: list[float]) -> None:
    assert get_terms([name])[name].of(measured()).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [torch.tensor([1.5, -1.0]), torch.tensor([2, -1])], ids=["floats", "integers"])
def test_el2n_of_a_regression_is_the_distance(labels: torch.Tensor) -> None:
    result = get_terms(["el2n"])["el2n"].of(measured(logits=torch.tensor([[1.0], [1.0]]), labels=labels))
    assert result.tolist() == [abs(1.0 - float(label)) for label in labels]


def test_an_unknown_term_names_the_nearest_and_all() -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'convergence'.*loss_reduction"):
        get_terms(("loss", "convergance"))


def halved(m: Measured) -> torch.Tensor:
    return m.loss / 2


def test_a_function_is_a_term_by_its_own_name() -> None:
    result = get_terms(["loss", halved, Term(halved, gradient=True), "halved"])
    assert list(result) == ["loss", "halved"]
    assert result["halved"].gradient
    assert result["halved"].of(measured()).tolist() == pytest.approx([0.35, 0.7])


def test_a_function_without_a_usable_name_is_refused() -> None:
    def own(m: Measured) -> torch.Tensor:
        return m.loss

    for own.__name__ in ("<lambda>", "loss", "convergence"):
        with pytest.raises(SettingsError, match=f"'{own.__name__}'"):
            get_terms([own])


@pytest.mark.parametrize(
    ("values", "groups", "expected"),
    [
        # Median 3, absolute deviations 2 1 0 1 97: MAD 1.
        ([1.0, 2.0, 3.0, 4.0, 100.0], ONE, [-2 / 1.4826, -1 / 1.4826, 0, 1 / 1.4826, CLIP]),
        # Of a MAD of zero the interquartile range: quartiles 0 and 1 of 0 0 0 1 5.
        ([0.0, 0.0, 0.0, 1.0, 5.0], ONE + 7, [0, 0, 0, 1.349, CLIP]),
        # A group without spread is zero, and a spread of rounding errors is none.
        ([2.0, 2.0, 2.0, 2.0, 9.0, 1.0], np.array([3, 3, 3, 3, 3, 4]), [0] * 6),
        (np.float32(0.7) + np.float32(1e-7) * np.arange(5, dtype=np.float32), ONE, [0] * 5),
    ],
)
def test_standardised_by_hand(values: Any, groups: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(standardise(np.asarray(values), groups), expected, atol=0)


@given(VALUES, st.integers(0, 2**32), st.integers(1, 4))
def test_each_group_is_standardised_by_itself(values: np.ndarray, seed: int, groups: int) -> None:
    which = np.random.default_rng(seed).integers(groups, size=len(values))
    together = standardise(values, which)
    for group in np.unique(which):
        rows = which == group
        np.testing.assert_array_equal(together[rows], standardise(values[rows], which[rows]))


@given(VALUES, st.floats(0.01, 100))
def test_scale_does_not_matter_and_order_is_kept(values: np.ndarray, factor: float) -> None:
    group = np.zeros(len(values), dtype=np.int64)
    result, scaled = standardise(values, group), standardise(factor * values, group)
    np.testing.assert_allclose(scaled, result, atol=1e-6)
    assert np.abs(result).max() <= CLIP
    assert (np.diff(result[np.argsort(values)]) >= 0).all()


def test_quality_is_the_weighted_sum() -> None:
    z = {"loss": np.array([1.0, -1.0]), "el2n": np.array([0.5, 2.0]), "cosine": np.array([9.0, 9.0])}
    result = quality(z, {"loss": 2.0, "el2n": -1.0, "cosine": 0.0})
    assert result.tolist() == [1.5, -4.0]
