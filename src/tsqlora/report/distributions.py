"""Terms, quality and probability of all rows -> counts in bins, kept rows against left-out ones."""

from dataclasses import dataclass

import numpy as np

from tsqlora.quality.scores import Scores

BINS = 40
TAIL = 0.002
"""The share of rows at each end that the outermost bins take in, however far away they are."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """One number of every row, in bins: `edges` has one value more than `kept` and `left_out`."""

    name: str
    edges: list[float]
    kept: list[int]
    left_out: list[int]
    least: float
    most: float


def distributions(scores: Scores) -> list[Distribution]:
    """Of each term, of the quality Q and of the probability p; of p only for kept rows, since others have none."""
    kept = scores.kept
    named = [(name, values, kept, ~kept) for name, values in scores.terms.items()]
    named.append(("quality", scores.quality, kept, ~kept))
    named.append(("probability", scores.probability, kept, np.zeros_like(kept)))
    return [_binned(name, np.asarray(v, dtype=np.float64), k, out) for name, v, k, out in named]


def _binned(name: str, values: np.ndarray, kept: np.ndarray, left_out: np.ndarray) -> Distribution:
    shown = values[kept | left_out]
    low, high = np.quantile(shown, [TAIL, 1 - TAIL])
    if not high - low > 1e-12 * max(abs(low), abs(high)):  # one value, up to rounding
        low, high = shown.min(), shown.max()
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    edges = np.linspace(low, high, BINS + 1)
    inside = np.clip(values, low, high)
    return Distribution(
        name,
        edges.tolist(),
        np.histogram(inside[kept], edges)[0].tolist(),
        np.histogram(inside[left_out], edges)[0].tolist(),
        float(shown.min()),
        float(shown.max()),
    )
