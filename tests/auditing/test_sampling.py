import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from oracles import slow_successive_sampling
from tsqlora.errors import SettingsError
from tsqlora.sampling import (
    LEAST_OF_CLASS,
    capped_sizes,
    draw,
    draw_size,
    effective_sample_size,
    gumbel_top_k,
    probabilities,
    rows_to_fit,
    stratum_sizes,
)

SEEDS = st.integers(0, 2**32)
QUALITIES = st.lists(st.floats(-20, 20), min_size=1, max_size=30).map(np.array)
COUNTS = st.lists(st.integers(1, 50), min_size=1, max_size=8).map(np.array)


@given(QUALITIES, st.floats(0.05, 20), st.floats(-1e3, 1e3))
def test_probabilities_sum_to_one_and_do_not_change_with_a_shift(q: np.ndarray, tau: float, shift: float) -> None:
    p = probabilities(q, temperature=tau)
    assert p.sum() == pytest.approx(1)
    assert (p >= 0).all()
    np.testing.assert_allclose(probabilities(q + shift, temperature=tau), p, rtol=1e-6, atol=1e-12)


def test_probabilities_by_hand() -> None:
    p = probabilities(np.array([0.0, np.log(9)]), temperature=2.0)
    np.testing.assert_allclose(p, [0.25, 0.75])
    assert effective_sample_size(p) == pytest.approx(1 / (0.25**2 + 0.75**2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(SettingsError, match=f"temperature is {temperature}; it must be above 0"):
        probabilities(np.zeros(2), temperature=temperature)
    with pytest.raises(SettingsError, match="it must be above 0"):
        draw(np.zeros(2), size=1, temperature=temperature, rng=np.random.default_rng(0))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_of_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(SettingsError, match=f"fraction is {fraction}; it must be above 0 and at most 1"):
        draw_size(10, fraction)


@given(st.integers(1, 1000), st.floats(1e-6, 1))
def test_a_draw_has_its_share_and_at_least_one(rows: int, fraction: float) -> None:
    size = draw_size(rows, fraction)
    assert 1 <= size <= rows
    assert -1e-6 <= size - rows * fraction < 1
    assert math.ceil(1 / fraction - 1e-9) * size >= rows, "in as many draws as a pass takes, every row can come once"


@given(COUNTS, st.floats(0, 1))
def test_strata_have_their_shares_to_within_one_and_at_least_one(counts: np.ndarray, share: float) -> None:
    size = len(counts) + round(share * (counts.sum() - len(counts)))
    sizes = stratum_sizes(counts, size)
    assert sizes.sum() == size
    assert (sizes >= 1).all()
    assert (sizes <= counts).all()
    exact = counts * size / counts.sum()
    if (exact >= 1).all():
        assert (np.abs(sizes - exact) < 1).all()


def test_remainders_are_handed_out_largest_first_and_ties_to_the_earlier() -> None:
    # Shares 2.8, 1.4 and 2.8; then two of 2.5.
    assert stratum_sizes(np.array([4, 2, 4]), 7).tolist() == [3, 1, 3]
    assert stratum_sizes(np.array([5, 5]), 5).tolist() == [3, 2]
    # Shares 9.7 and three of 0.1: each small one gets its row from the large one.
    assert stratum_sizes(np.array([97, 1, 1, 1]), 10).tolist() == [7, 1, 1, 1]


@given(COUNTS, st.floats(0, 1), SEEDS)
def test_capped_sizes_add_up_within_their_limits(counts: np.ndarray, share: float, seed: int) -> None:
    limits = np.random.default_rng(seed).integers(0, counts + 1)
    size = len(counts) + round(share * (limits.sum() - len(counts)))
    if not len(counts) <= size <= limits.sum():
        return
    sizes = capped_sizes(counts, size, limits)
    assert sizes.sum() == size
    assert (sizes <= limits).all()
    assert (sizes[limits > 0] >= 1).all()
    if (stratum_sizes(counts, size) <= limits).all():
        assert sizes.tolist() == stratum_sizes(counts, size).tolist()


@given(QUALITIES, SEEDS)
def test_only_kept_rows_are_drawn_and_keeping_all_changes_nothing(q: np.ndarray, seed: int) -> None:
    retained = np.random.default_rng(seed).random(len(q)) < 0.7
    fraction = max(retained.mean(), 0.01) * 0.9

    def drawn(retained: np.ndarray | None) -> np.ndarray:
        return draw(
            q, size=draw_size(len(q), fraction), temperature=1.0, rng=np.random.default_rng(seed), kept=retained
        )

    np.testing.assert_array_equal(drawn(np.ones(len(q), dtype=np.bool_)), drawn(None))
    if draw_size(len(q), fraction) <= retained.sum():
        assert retained[drawn(retained)].all()


@given(QUALITIES, st.floats(0.01, 1), SEEDS)
def test_a_draw_is_ascending_without_repeats_and_the_same_for_the_same_seed(
    q: np.ndarray, fraction: float, seed: int
) -> None:
    one, two = (
        draw(q, size=draw_size(len(q), fraction), temperature=1.0, rng=np.random.default_rng(seed)) for _ in range(2)
    )
    assert len(one) == draw_size(len(q), fraction)
    assert (np.diff(one) > 0).all()
    assert (one < len(q)).all()
    np.testing.assert_array_equal(one, two)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40).map(np.array), SEEDS)
def test_a_stratified_draw_keeps_the_shares(strata: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    taken = draw(
        rng.normal(size=len(strata)), size=draw_size(len(strata), 0.5), temperature=1.0, rng=rng, strata=strata
    )
    names, counts = np.unique(strata, return_counts=True)
    sizes = stratum_sizes(counts, draw_size(len(strata), 0.5))
    assert [int((strata[taken] == name).sum()) for name in names] == sizes.tolist()


def test_gumbel_top_k_is_successive_sampling() -> None:
    p = np.array([0.45, 0.3, 0.15, 0.1])
    pairs = list(itertools.permutations(range(4), 2))
    draws = 6000
    fast, slow = np.random.default_rng(0), np.random.default_rng(1)
    ours = [tuple(gumbel_top_k(np.log(p), 2, fast).tolist()) for _ in range(draws)]
    twin = [tuple(slow_successive_sampling(p, 2, slow).tolist()) for _ in range(draws)]
    counts = np.array([[result.count(pair) for pair in pairs] for result in (ours, twin)])
    assert stats.chi2_contingency(counts).pvalue > 0.01
    exact = np.array([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert stats.chisquare(counts[0], draws * exact).pvalue > 0.01


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any),
    size=st.integers(1, 2_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_sample_of_a_fit_has_rows_of_each_class_and_weights_that_restore_its_share(
    counts: list[int], size: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    rows, weights = rows_to_fit(labels, size)
    drawn = np.bincount(labels[rows], minlength=len(counts))
    assert len(np.unique(rows)) == len(rows)
    assert (np.diff(rows) > 0).all()
    assert (drawn >= np.minimum(counts, LEAST_OF_CLASS)).all()
    assert len(rows) <= size + LEAST_OF_CLASS * len(counts)
    np.testing.assert_allclose(np.bincount(labels[rows], weights, len(counts)) / len(rows), counts / np.sum(counts))
    if size >= len(labels):
        assert np.array_equal(rows, np.arange(len(labels)))
