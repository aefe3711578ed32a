"""Near-duplicates with different labels, by the angle between their features.  [ours]"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

NEAR = 0.93
"""Cosine of centred features.  On CLINC150's mean hidden states pairs above it say the same or nearly so."""
ROWS = 50_000
"""So many are compared, each with each: on two cores some minutes."""
MOST = 1_000
_AT_ONCE = 1_024


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two rows, by their ids, that are nearly alike and labelled differently."""

    first: int
    second: int
    similarity: float


def contradictions(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], ids: Int[np.ndarray, " n"]
) -> tuple[Contradiction, ...]:
    """The nearest pairs with different labels, among the first ROWS rows; at most MOST."""
    unit = features[:ROWS].astype(np.float32)
    unit = unit - unit.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(min=1e-12)
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(unit), _AT_ONCE):
        similar = unit[start : start + _AT_ONCE] @ unit[start:].T
        first, second = np.nonzero(similar >= NEAR)
        unlike = (second > first) & (labels[first + start] != labels[second + start])
        pairs = zip(first[unlike], second[unlike], strict=True)
        found += [(-float(similar[a, b]), int(ids[a + start]), int(ids[b + start])) for a, b in pairs]
        found = sorted(found)[:MOST]
    return tuple(Contradiction(a, b, min(-negative, 1.0)) for negative, a, b in found)
