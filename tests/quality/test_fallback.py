"""The learned test."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import TsqLoraError
from tsqlora.quality.fallback import against_chance, learned
from tsqlora.tasks.classification import Classification

LOSSES = st.lists(st.floats(-10, 10), min_size=2, max_size=30)


def test_numbers_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1/√3.
    test = learned(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
    assert test.rows == 3
    assert test.loss == pytest.approx(1 / 3)
    assert test.chance == pytest.approx(7 / 3)
    assert test.standard_errors == pytest.approx(2 * math.sqrt(3))
    assert test.passed


@given(LOSSES, st.integers(0, 2**32))
def test_it_is_one_sided(losses: list[float], seed: int) -> None:
    chance = torch.randn(len(losses), generator=torch.Generator().manual_seed(seed)).double()
    there, back = learned(torch.tensor(losses).double(), chance), learned(chance, torch.tensor(losses).double())
    assert there.standard_errors == pytest.approx(-back.standard_errors)
    assert not (there.passed and back.passed)


def test_identical_rows_are_finitely_far_away() -> None:
    test = learned(torch.full((4,), 0.1), torch.full((4,), 0.5))
    assert test.passed
    assert math.isfinite(test.standard_errors)


def test_labels_that_are_all_the_same_are_named_as_the_reason() -> None:
    test = against_chance(Classification(), torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    assert not test.passed
    assert "all 5 rows have the same label" in test.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(TsqLoraError, match="1 of 3"):
        learned(torch.tensor([0.1, value, 0.2]), torch.ones(3))
