from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.rows.batches import bucketed_order, sorted_batches

LENGTHS = st.lists(st.integers(1, 500), max_size=300)
BATCH_SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32)


def order_of(lengths: list[int], batch_size: int, seed: int = 0) -> list[int]:
    return bucketed_order(lengths, batch_size=batch_size, rng=np.random.default_rng(seed)).tolist()


def padding(lengths: list[int], order: list[int], batch_size: int) -> int:
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)


@given(LENGTHS, BATCH_SIZES, SEEDS)
def test_every_sample_comes_once(lengths: list[int], batch_size: int, seed: int) -> None:
    assert sorted(order_of(lengths, batch_size, seed)) == list(range(len(lengths)))


@given(LENGTHS, BATCH_SIZES, SEEDS)
def test_runs_of_a_batch_do_not_overlap_in_length(lengths: list[int], batch_size: int, seed: int) -> None:
    if len(lengths) > 50 * batch_size:
        return  # several megabatches: each is sorted for itself
    order = order_of(lengths, batch_size, seed)
    runs = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    spans = sorted((min(lengths[i] for i in run), max(lengths[i] for i in run)) for run in runs)
    assert all(a[1] <= b[0] or a[0] == b[0] for a, b in pairwise(spans))


def test_little_is_padded_also_with_many_megabatches_and_a_rest() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 2003).tolist()
    bucketed, shuffled = order_of(lengths, 8), np.random.default_rng(1).permutation(2003).tolist()
    assert padding(lengths, bucketed, 8) < padding(lengths, shuffled, 8) / 10


def test_batches_come_in_random_order() -> None:
    lengths = list(range(400))
    firsts = [lengths[i] for i in order_of(lengths, 8)[::8]]
    assert firsts != sorted(firsts, reverse=True)
    assert order_of(lengths, 8) == order_of(lengths, 8) != order_of(lengths, 8, seed=1)


def test_equal_lengths_are_shuffled() -> None:
    order = order_of([5] * 100, 4)
    batches = [sorted(order[start : start + 4]) for start in range(0, 100, 4)]
    assert sum(batch[3] - batch[0] == 3 for batch in batches) < 5


@given(LENGTHS, BATCH_SIZES)
def test_sorted_batches_hold_every_sample_once_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = sorted_batches(lengths, batch_size)
    flat = [int(i) for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])
