"""Near-duplicates with different labels, and the label of the nearest row, by cosine of centred features."""

from dataclasses import dataclass

import numpy as np

from tsqlora.compat.shapes import Float, Int
from tsqlora.quality.label_noise import Labels

NEAR = 0.93
"""Cosine of centred features above which rows are near-duplicates: on CLINC150's mean hidden states such pairs say
(nearly) the same."""
ROWS_TO_COMPARE = 50_000
"""Compare at most this many rows with each other, which takes some minutes on two cores."""
MOST_CONTRADICTIONS = 1_000


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two near-duplicate rows, by their ids, with different labels."""

    first: int
    second: int


def contradictions(
    features: Float[np.ndarray, "n d"], labels: Labels, ids: Int[np.ndarray, " n"]
) -> tuple[Contradiction, ...]:
    """Return the nearest pairs with different labels among the first rows.  [ours]"""
    unit = _unit(features[:ROWS_TO_COMPARE])
    nearest: list[tuple[float, int, int]] = []
    for start in range(0, len(unit), 1_024):
        similar = unit[start : start + 1_024] @ unit[start:].T
        first, second = np.nonzero(similar >= NEAR)
        unlike = (second > first) & (labels[first + start] != labels[second + start])
        pairs = zip(first[unlike], second[unlike], strict=True)
        nearest += [(-float(similar[a, b]), int(ids[a + start]), int(ids[b + start])) for a, b in pairs]
        nearest = sorted(nearest)[:MOST_CONTRADICTIONS]
    return tuple(Contradiction(a, b) for _, a, b in nearest)


def _unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return centred features of norm 1."""
    centred = features.astype(np.float32)
    centred -= centred.mean(axis=0)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(min=1e-12)


def labels_of_nearest(
    features: Float[np.ndarray, "n d"], labels: Labels, rows: Int[np.ndarray, " n"], some: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " m"]:
    """Return the label that is nearest to each of some labels, by cosine of centred features, in another row."""
    unit, nearest = _unit(features), list[np.ndarray]()
    for start in range(0, len(some), 256):
        part = some[start : start + 256]
        similar = unit[part] @ unit.T
        similar[rows[part][:, None] == rows] = -np.inf
        nearest.append(similar.argmax(axis=1))
    return labels[np.concatenate(nearest)]
