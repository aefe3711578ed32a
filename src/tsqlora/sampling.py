"""Sampling by quality: softmax, Gumbel top-k without replacement, strata.  docs/method.md eq. 5.

Also the sample of rows that a fit uses. Pure functions of numbers; randomness is an argument.
"""

import math

import numpy as np

from tsqlora.errors import SettingsError
from tsqlora.libs.shapes import Bool, Float, Int

LEAST_OF_CLASS = 20
"""Rows of each class in the sample of a fit, if it has so many: a fit without one calls the class wrong."""


def rows_to_fit(labels: Int[np.ndarray, " n"], size: int) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Return about `size` rows, ascending, evenly spaced within each class, and weights of mean 1.

    Each class has at least LEAST_OF_CLASS rows, or all that it has; the weights restore its share.

    >>> rows, weights = rows_to_fit(np.repeat([0, 1], [400, 20]), 40)
    >>> np.bincount(np.repeat([0, 1], [400, 20])[rows]), weights[[0, -1]].round(2)
    (array([38, 20]), array([1.45, 0.14]))
    """
    counts = np.bincount(labels)
    sizes = counts if size >= len(labels) else np.maximum(counts * size // len(labels), counts.clip(max=LEAST_OF_CLASS))
    order = np.argsort(labels, kind="stable")
    own = labels[order]
    place = np.arange(len(labels)) - (np.cumsum(counts) - counts)[own]
    chosen = place * sizes[own] // counts[own] < (place + 1) * sizes[own] // counts[own]
    rows = np.sort(order[chosen])
    return rows, (counts / sizes.clip(1))[labels[rows]] * (len(rows) / max(len(labels), 1))


def probabilities(quality: Float[np.ndarray, " n"], *, temperature: float) -> Float[np.ndarray, " n"]:
    """Return exp(Q/τ) / Σ exp(Q/τ).  Raises SettingsError for a temperature that is not above 0."""
    scaled = log_weights(quality, temperature)
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def log_weights(quality: Float[np.ndarray, " n"], temperature: float) -> Float[np.ndarray, " n"]:
    """Return φ = Q/τ.  Raises SettingsError for a temperature that is not above 0."""
    require_temperature(temperature)
    return quality / temperature


def require_temperature(temperature: float) -> None:
    """Raise SettingsError unless 0 < τ < ∞."""
    if not 0 < temperature < np.inf:
        raise SettingsError(f"temperature is {temperature}; it must be above 0 and finite")


def effective_sample_size(p: Float[np.ndarray, " n"]) -> float:
    """Return 1 / Σ p²: the number of equally likely samples that the draw is worth."""
    return float(1 / np.square(p).sum())


def draw_size(rows: int, fraction: float) -> int:
    """Return the number of rows in a fraction, rounded up, so that 1/f draws can cover every row.

    Raises SettingsError outside 0 < f ≤ 1.

    >>> draw_size(1001, 0.5)
    501
    """
    if not 0 < fraction <= 1:
        raise SettingsError(f"fraction is {fraction}; it must be above 0 and at most 1")
    return max(1, math.ceil(rows * fraction - 1e-9))  # 0.3 · 10 is a little above 3


def stratum_sizes(counts: Int[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """Divide `size` in proportion to `counts` by largest remainder, with at least one each.

    Ties go to the earlier stratum.  Raises SettingsError for more strata than `size`.

    >>> stratum_sizes(np.array([70, 20, 10]), 10)
    array([7, 2, 1])
    """
    if size < len(counts):
        raise SettingsError(f"a draw of {size} rows cannot hold one of each of {len(counts)} labels; raise fraction")
    share = counts * (size / counts.sum())
    sizes = np.maximum(np.floor(share + 1e-9).astype(np.int64), 1)
    while sizes.sum() < size:
        sizes[np.argmax(np.round(np.where(sizes < counts, share - sizes, -np.inf), 9))] += 1
    while sizes.sum() > size:
        sizes[np.argmax(np.round(np.where(sizes > 1, sizes - share, -np.inf), 9))] -= 1
    return sizes


def capped_sizes(counts: Int[np.ndarray, " k"], size: int, limits: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Return `stratum_sizes` capped at `limits`; other strata make up the difference in proportion.

    Raises SettingsError where the limits sum to less than `size`.

    >>> capped_sizes(np.array([50, 30, 20]), 20, np.array([2, 30, 20]))
    array([ 2, 11,  7])
    """
    require_enough(size, kept=int(limits.sum()), rows=int(counts.sum()))
    sizes = stratum_sizes(counts, size)
    full = sizes > limits
    if full.any():
        sizes[full] = limits[full]
        sizes[~full] = capped_sizes(counts[~full], size - int(limits[full].sum()), limits[~full])
    return sizes


def require_enough(size: int, *, kept: int, rows: int) -> None:
    """Raise SettingsError for a draw of more rows than were kept."""
    if kept < size:
        raise SettingsError(
            f"a draw of {size} rows exceeds the {kept} of {rows} rows that are kept; "
            f"lower fraction to {math.floor(1000 * kept / rows) / 1000:g}"
        )


def gumbel_top_k(phi: Float[np.ndarray, " n"], k: int, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    """Return the k rows with the largest φ + Gumbel noise.

    This equals successive sampling from softmax(φ) without replacement (Kool et al., 2019).
    """
    return np.argsort(-(phi + rng.gumbel(size=len(phi))), kind="stable")[:k]


def draw(
    quality: Float[np.ndarray, " n"],
    *,
    size: int,
    temperature: float,
    rng: np.random.Generator,
    strata: Int[np.ndarray, " n"] | None = None,
    kept: Bool[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " m"]:
    """Draw `size` rows by softmax(Q/τ), ascending; each stratum keeps its share of all rows.

    Only `kept` rows are drawn; where a stratum has too few, the others make up the difference in proportion.
    """
    phi = log_weights(quality, temperature)
    groups = _groups(len(quality), size, strata, kept)
    return np.sort(np.concatenate([rows[gumbel_top_k(phi[rows], k, rng)] for rows, k in groups]))


def _groups(
    rows: int, size: int, strata: Int[np.ndarray, " n"] | None, kept: Bool[np.ndarray, " n"] | None
) -> list[tuple[Int[np.ndarray, " j"], int]]:
    """Return each stratum's kept rows, and how many of them a draw takes."""
    groups = np.zeros(rows, dtype=np.int64) if strata is None else strata
    may = np.ones(rows, dtype=np.bool_) if kept is None else kept
    names, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sizes = capped_sizes(counts, size, np.bincount(places[may], minlength=len(names)))
    return [(np.flatnonzero((groups == name) & may), int(k)) for name, k in zip(names, sizes, strict=True)]
