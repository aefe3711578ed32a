"""Intervals and paired differences against scipy, and the words for them."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.compare.statistics import Interval, interval, paired, verdict

# Spread apart: scipy knows no interval of scale 0, which is what a difference of 1e-308 comes to.
NUMBERS = st.lists(st.integers(-10_000, 10_000).map(lambda k: k / 100), min_size=2, max_size=8, unique=True)


@given(NUMBERS)
def test_an_interval_is_scipys(values: list[float]) -> None:
    found = interval(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), abs=1e-9)


@given(NUMBERS, st.floats(-5, 5))
def test_a_shift_of_every_seed_is_found_without_an_interval(values: list[float], shift: float) -> None:
    theirs = dict(enumerate(values))
    found = paired({seed: value + shift for seed, value in theirs.items()}, theirs)
    assert found is not None
    assert (found.mean, found.half) == pytest.approx((shift, 0.0), abs=1e-9)


def test_one_value_has_no_interval() -> None:
    assert interval([3.0]) == Interval(3.0, None, 1)


def test_only_seeds_that_both_have_are_compared() -> None:
    assert paired({0: 1.0, 1: 5.0}, {1: 2.0, 2: 9.0}) == Interval(3.0, None, 1)
    assert paired({0: 1.0}, {1: 2.0}) is None


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(0.02, 0.03, 3), "within noise of lora"),
        (Interval(-0.02, 0.03, 3), "within noise of lora"),
        (Interval(0.05, 0.03, 3), "better than lora"),
        (Interval(-0.05, 0.03, 3), "worse than lora"),
        (Interval(0.05, None, 1), "1 seed: too few to tell from lora"),
        (Interval(0.05, 0.001, 2), "2 seeds: too few to tell from lora"),
        (None, "no seed in common with lora"),
    ],
)
def test_words_say_what_the_interval_says(difference: Interval | None, words: str) -> None:
    assert verdict(difference, "lora") == words
    turned = words.replace("better", "?").replace("worse", "better").replace("?", "worse")
    assert verdict(difference, "lora", lower_is_better=True) == turned
