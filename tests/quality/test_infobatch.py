import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.quality.infobatch import info_batch

LOSSES = st.lists(st.floats(0, 10), min_size=1, max_size=40).map(np.array)


@given(LOSSES, st.floats(0.05, 1), st.integers(0, 2**32))
def test_rows_above_the_mean_come_first_and_the_others_make_up_for_those_left_out(
    losses: np.ndarray, fraction: float, seed: int
) -> None:
    size = max(1, round(fraction * len(losses)))
    rows, weights = info_batch(losses, size=size, rng=np.random.default_rng(seed))
    above = losses >= losses.mean()
    assert len(rows) == len(set(rows.tolist())) == len(weights) == size
    assert above[rows].sum() == min(size, above.sum())
    assert (weights[above[rows]] == 1).all()
    low = weights[~above[rows]]
    if len(low):
        np.testing.assert_allclose(low.sum(), (~above).sum())
        assert np.ptp(low) == 0


def test_where_rows_above_the_mean_fit_the_weighted_sum_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    losses, gradients = rng.exponential(size=60), rng.normal(size=60) + 1
    sums = []
    for _ in range(2000):
        rows, weights = info_batch(losses, size=40, rng=rng)
        sums.append(float(weights @ gradients[rows]))
    assert abs(np.mean(sums) - gradients.sum()) < 4 * np.std(sums) / np.sqrt(len(sums))


def test_all_rows_have_weight_one() -> None:
    rows, weights = info_batch(np.arange(5.0), size=5, rng=np.random.default_rng(0))
    assert sorted(rows.tolist()) == list(range(5))
    assert (weights == 1).all()
