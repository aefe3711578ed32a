"""Batches of like lengths, so that little is padded, and of few different ones."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# Batches among which samples are sorted: more pads less, fewer mixes better.
MEGABATCH = 50


def bucketed_order(lengths: Sequence[int], *, batch_size: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A random permutation in which each run of `batch_size` has samples of like length.

    Shuffled, sorted inside megabatches of 50 batches, cut into batches, the batches shuffled.
    A smaller last batch stays last, so that the runs are the batches a DataLoader cuts.
    """
    assert batch_size >= 1, batch_size
    sizes = np.asarray(lengths, dtype=np.int64)
    shuffled = rng.permutation(len(sizes))
    megabatches = _cut(shuffled, MEGABATCH * batch_size)
    batches = [batch for mega in megabatches for batch in _cut(_longest_first(mega, sizes), batch_size)]
    whole = len(sizes) // batch_size
    order = [*rng.permutation(whole).tolist(), *range(whole, len(batches))]
    return np.concatenate([np.empty(0, dtype=np.int64), *(batches[j] for j in order)])


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[Int[np.ndarray, " b"]]:
    """Batches of sample indices, the longest samples first: too large a batch fails at once.

    >>> [batch.tolist() for batch in sorted_batches([1, 9, 5], 2)]
    [[1, 2], [0]]
    """
    assert batch_size >= 1, batch_size
    sizes = np.asarray(lengths, dtype=np.int64)
    return _cut(_longest_first(np.arange(len(sizes)), sizes), batch_size)


def _longest_first(indices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    # Stable: samples of one length must come out in the same order on every machine.
    return indices[np.argsort(-sizes[indices], kind="stable")]


def _cut(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
