"""Means over seeds, and differences between methods of the same seed, with their 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import scipy.stats

CONFIDENCE = 0.95
FEWEST = 3
"""Seeds that a verdict needs: one or two may agree by chance."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of n values and the half width of its t-interval, None for a single value."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Student's t-interval of the mean of at least one value.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half=2.484..., n=3)
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, None, n)
    # Not ttest_rel's own interval: it warns where all values are equal, as runs with the same draws are.
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * scipy.stats.sem(values)
    return Interval(mean, float(half), n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The paired difference, ours minus theirs, over the seeds that both have; None if there are none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def verdict(difference: Interval | None, other: str, *, lower_is_better: bool = False) -> str:
    """The difference in words.

    >>> verdict(Interval(0.02, 0.03, 3), "lora")
    'within noise of lora'
    >>> verdict(Interval(0.05, 0.03, 3), "lora")
    'better than lora'
    >>> verdict(Interval(0.05, 0.03, 3), "lora", lower_is_better=True)
    'worse than lora'
    """
    if difference is None:
        return f"no seed in common with {other}"
    if difference.n < FEWEST or difference.low is None or difference.high is None:
        return f"{difference.n} seed{'s' if difference.n > 1 else ''}: too few to tell from {other}"
    if difference.low > 0 or difference.high < 0:
        better = (difference.low > 0) != lower_is_better
        return f"{'better' if better else 'worse'} than {other}"
    return f"within noise of {other}"
