import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import TsqLoraError
from tsqlora.quality.learned import LearnedTest, against_chance, learned
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


@given(LOSSES)
def test_no_difference_is_no_distance(losses: list[float]) -> None:
    test = learned(torch.tensor(losses), torch.tensor(losses))
    assert test.standard_errors == 0
    assert not test.passed


@given(LOSSES, st.integers(0, 2**32))
def test_it_is_one_sided(losses: list[float], seed: int) -> None:
    chance = torch.randn(len(losses), generator=torch.Generator().manual_seed(seed)).double()
    there, back = learned(torch.tensor(losses).double(), chance), learned(chance, torch.tensor(losses).double())
    assert there.standard_errors == pytest.approx(-back.standard_errors)
    assert not (there.passed and back.passed)


def test_rows_that_are_all_alike_are_finitely_far_away_and_json() -> None:
    test = learned(torch.full((4,), 0.1), torch.full((4,), 0.5))
    assert test.passed
    assert json.loads(json.dumps(test.to_dict(), allow_nan=False)) == test.to_dict()


def test_two_standard_errors_are_not_more_than_two() -> None:
    assert not LearnedTest(rows=600, loss=0.68, chance=0.69, standard_errors=2.0).passed
    assert LearnedTest(rows=600, loss=0.68, chance=0.69, standard_errors=2.01).passed


def test_labels_that_are_all_the_same_are_named_as_the_reason() -> None:
    test = against_chance(Classification(), torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    assert not test.passed
    assert "all 5 rows have the same label" in test.told


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(TsqLoraError, match=r"1 of 3 losses are not finite"):
        learned(torch.tensor([0.1, value, 0.2]), torch.ones(3))
