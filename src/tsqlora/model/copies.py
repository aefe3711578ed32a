"""Rows that are there several times, by their features."""

import numpy as np

from tsqlora.libs.shapes import Float, Int

ROWS_AT_ONCE = 16_384
"""Read features in parts of this many rows, since they may be a memory map."""
COPY = 1e-3
"""Distance of a copy's features, as a share of their norm: batches differ in their last digits."""


def distinct(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], along: Float[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n"]]:
    """Return the first row of each set of copies with one label, and the set of each row; copies lie together `along`.

    >>> distinct(np.array([[3.0], [1.0], [3.0]]), np.array([0, 0, 0]), np.array([3.0, 1.0, 3.0]))
    (array([0, 1]), array([1, 0, 1]))
    """
    order = np.lexsort((along, labels))
    new = np.ones(len(labels), np.bool_)
    for start in range(0, len(order), ROWS_AT_ONCE):
        some = features[order[start : start + ROWS_AT_ONCE + 1]]
        apart = np.linalg.norm(np.diff(some, axis=0), axis=1)
        new[start + 1 : start + len(some)] = apart > COPY * np.linalg.norm(some[1:], axis=1)
    new[1:] |= np.diff(labels[order]) != 0
    number = np.empty(len(labels), np.int64)
    number[order] = np.cumsum(new) - 1
    return np.unique(number, return_index=True)[1], number


def groups_of_copies(features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"] | None:
    """Return groups of rows with equal features; None if all differ."""
    along = features @ np.random.default_rng(0).normal(size=features.shape[1]).astype(np.float32)
    first, groups = distinct(features, np.zeros(len(features), np.int64), along)
    return groups if len(first) < len(features) else None
