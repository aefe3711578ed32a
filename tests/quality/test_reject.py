import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tsqlora.errors import SettingsError
from tsqlora.quality.reject import most_surprising, noise_rate, reject, surprise

SEEDS = st.integers(0, 2**32 - 1)


def two_classes(seed: int, *, rows: int = 600, wrong: float = 0.0, sure: float = 3.0) -> dict[str, np.ndarray]:
    """Rows of a model whose logit for class 1 is ±`sure` with noise; so many of the labels are turned round."""
    rng = np.random.default_rng(seed)
    true = rng.permutation(rows) % 2
    bad = rng.permutation(rows) < round(wrong * rows)
    labels = np.where(bad, 1 - true, true)
    margin = (2 * true - 1) * sure + rng.normal(size=rows)
    p = 1 / (1 + np.exp(-margin))
    return {
        "confidence": np.maximum(p, 1 - p),
        "agrees": (p > 0.5) == (labels == 1),
        "loss": -np.log(np.where(labels == 1, p, 1 - p)),
        "labels": labels,
        "bad": bad,
    }


def known(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in rows.items() if name != "bad"}


def test_the_rate_by_hand() -> None:
    confidence = np.array([0.9, 0.6, 0.8, 0.5, 0.95, 0.7])
    agrees = np.array([True, False, False, False, True, True])
    found = noise_rate(confidence, agrees, confident=0.5)
    assert (found.rate, found.rows) == (1 / 3, 3)
    assert found.expected == pytest.approx((0.1 + 0.2 + 0.05) / 3)


@given(wrong=st.integers(0, 40), rows=st.integers(1, 40), level=st.sampled_from([0.6, 0.95]))
def test_a_bound_is_the_rate_at_which_the_count_has_the_other_level(wrong: int, rows: int, level: float) -> None:
    wrong = min(wrong, rows)
    found = noise_rate(np.full(rows, 0.9), np.arange(rows) >= wrong, confident=1.0, level=level)
    assert found.low <= found.rate <= found.high
    # So many or more contradictions at the lower bound, so many or fewer at the upper: each has chance 1 − level.
    if wrong:
        assert binom.sf(wrong - 1, rows, found.low) == pytest.approx(1 - level)
    if wrong < rows:
        assert binom.cdf(wrong, rows, found.high) == pytest.approx(1 - level)


@given(seed=SEEDS)
def test_the_order_of_the_rows_decides_nothing(seed: int) -> None:
    rows = known(two_classes(seed, rows=60, wrong=0.2))
    rows["confidence"] = np.round(rows["confidence"], 2)
    order = np.random.default_rng(seed).permutation(60)
    mask, noise = reject(**rows)
    moved, again = reject(**{name: values[order] for name, values in rows.items()})
    assert (again.rate, again.low, again.rows) == (noise.rate, noise.low, noise.rows)
    assert again.expected == pytest.approx(noise.expected)
    np.testing.assert_array_equal(moved, mask[order])


@given(seed=SEEDS, wrong=st.sampled_from([0.1, 0.2, 0.4]))
def test_wrong_labels_are_counted_and_found(seed: int, wrong: float) -> None:
    rows = two_classes(seed, wrong=wrong)
    mask, noise = reject(**known(rows), factor=1.0, most=0.9)
    assert noise.evident
    assert noise.rate == pytest.approx(wrong, abs=0.12)
    assert mask.sum() == round(noise.rate * 600)
    if wrong <= noise.rate:
        assert mask[rows["bad"]].mean() > 0.9
    else:
        assert rows["bad"][mask].mean() > 0.9


@given(seed=SEEDS)
def test_nothing_is_rejected_from_clean_rows(seed: int) -> None:
    mask, noise = reject(**known(two_classes(seed)))
    assert not noise.evident
    assert not mask.any()


@given(seed=SEEDS)
def test_nothing_is_rejected_by_a_model_that_expects_to_be_contradicted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5, 0.65, size=400)
    # Right less often than it expects only by chance: at most 5 times in 100, and never so in the mean.
    agrees = rng.permutation(400) < 260
    mask, noise = reject(confidence, agrees, -np.log(confidence), np.zeros(400, dtype=np.int64))
    assert noise.expected > 0.35
    assert bool(mask.any()) == noise.evident == (noise.low > noise.expected)


def test_as_many_are_rejected_as_factor_and_limit_say() -> None:
    rows = known(two_classes(0, wrong=0.2))
    rate = noise_rate(rows["confidence"], rows["agrees"]).rate
    for factor, most in ((0.5, 0.4), (1.0, 0.4), (1.5, 0.4), (5.0, 0.4), (5.0, 0.1)):
        mask, _ = reject(**rows, factor=factor, most=most)
        assert mask.sum() == round(min(factor * rate, most) * 600)


def test_surprise_by_hand() -> None:
    loss = np.array([0.1, 2.0, 0.3, 1.0, 4.0])
    labels = np.array(["a", "b", "a", "b", "b"])
    assert surprise(loss, labels).tolist() == pytest.approx([-0.1, 0.0, 0.1, -1.0, 2.0])
    assert most_surprising(loss, labels, 2).tolist() == [False, False, True, False, True]


@given(seed=SEEDS, shift=st.floats(0, 5))
def test_a_class_that_is_harder_as_a_whole_loses_no_more_rows(seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    loss, labels = rng.exponential(size=50), rng.integers(0, 3, size=50)
    harder = loss + shift * (labels == 1)
    np.testing.assert_allclose(surprise(harder, labels), surprise(loss, labels), atol=1e-12)


def test_of_equal_rows_the_earlier_goes() -> None:
    assert most_surprising(np.ones(4), np.zeros(4, dtype=np.int64), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confident": 0.0}, "confident is 0.0; it must be above 0 and at most 1"),
        ({"confident": 1.5}, "confident is 1.5; it must be above 0 and at most 1"),
        ({"level": 1.0}, "level is 1.0; it must be above 0.5 and below 1"),
        ({"level": 0.5}, "level is 0.5; it must be above 0.5 and below 1"),
        ({"factor": -1.0}, "factor is -1.0; it must be 0 or more"),
        ({"factor": math.nan}, "factor is nan; it must be 0 or more"),
        ({"most": 1.0}, "most is 1.0; it must be at least 0 and below 1"),
        ({"most": -0.1}, "most is -0.1; it must be at least 0 and below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        reject(**known(two_classes(0, rows=20)), **changes)
    assert str(error.value) == message


def test_no_rows_are_refused() -> None:
    with pytest.raises(SettingsError, match="there are no rows to tell a rate of wrong labels from"):
        noise_rate(np.empty(0), np.empty(0, dtype=bool))


@pytest.mark.parametrize("count", [-1, 4])
def test_more_rows_than_there_are_cannot_be_rejected(count: int) -> None:
    with pytest.raises(SettingsError, match=f"{count} of 3 rows cannot be rejected"):
        most_surprising(np.ones(3), np.zeros(3, dtype=np.int64), count)
