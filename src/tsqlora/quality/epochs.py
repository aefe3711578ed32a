"""Which rows each epoch trains on: an immutable plan, and a sample as its first epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from tsqlora.errors import SettingsError
from tsqlora.quality.sampling import draw, draw_size, require_enough
from tsqlora.quality.scores import Scores
from tsqlora.seeds import stream

POOL_SHARE = 0.7
"""Of a run's steps, those that train on the pool; the trusted rows have the rest."""


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """The rows of every epoch, a pure function of (scores, seed, epoch).

    The pool is the training rows without those that are trusted, too. Before `scored_epoch`, and without scores, epochs
    walk through successive random orders of the pool, so that a pass leaves none out. From then on they walk through
    orders of the kept rows where scores draw evenly, or sample by softmax(Q/τ).

    Trusted rows are numbered from `rows` on. Each epoch has all of them among its rows; or, once `trusted_from` is
    known, none until there and nothing else afterwards.

    Raises SettingsError for a fraction outside 0 < f ≤ 1 and for scores of another number of rows.
    """

    rows: int
    fraction: float = 0.5
    seed: int = 0
    resample: bool = True
    """Whether each epoch is drawn afresh; else the first draw by quality, or without scores the first of all, stays."""
    trusted: int = 0
    """How many trusted rows there are."""
    excluded: Bool[np.ndarray, " n"] | None = None
    """Rows that are not in the pool, since their input equals a trusted row's."""
    trusted_from: tuple[int, int] | None = None
    """The epoch, and the place in it, from which on all rows are trusted ones."""
    scores: Scores | None = None
    scored_epoch: int = 0
    """The first epoch that scores decide."""
    awaits_scores: bool = False
    """Whether scores are still to come: ranks wait for them."""
    by: str | None = None
    """The callback that scores, or will; None where scores were given by hand."""

    def __post_init__(self) -> None:
        draw_size(self.rows, self.fraction)
        if self.scores is not None and len(self.scores) != self.rows:
            raise SettingsError(f"there are {len(self.scores)} scores for {self.rows} rows")
        if self.excluded is not None and self.excluded.all():
            raise SettingsError(f"all {self.rows} training rows are trusted rows, too; give other trusted rows")

    @property
    def size(self) -> int:
        """Rows of an epoch."""
        return draw_size(self.rows, self.fraction)

    def scored(self, scores: Scores, epoch: int, *, by: str | None = None) -> "EpochPlan":
        """Draw by these scores from `epoch` on."""
        return replace(self, scores=scores, scored_epoch=epoch, awaits_scores=False, by=by)

    def unscored(self, *, awaits_scores: bool = False, by: str | None = None) -> "EpochPlan":
        """Draw at random: for good, or until scores come."""
        return replace(self, scores=None, scored_epoch=0, awaits_scores=awaits_scores, by=by)

    def draw(self, epoch: int) -> Int[np.ndarray, " m"]:
        """The epoch's rows, in no particular order: those of the pool, then trusted ones."""
        return np.concatenate([self.from_pool(epoch), self.from_trusted(epoch)])

    def from_pool(self, epoch: int) -> Int[np.ndarray, " j"]:
        """The epoch's rows of the pool, in no particular order."""
        size, scores, pool = self.size - self._trusted_of(epoch), self.scores, self._pool()
        if scores is None or epoch < self.scored_epoch:
            # Until scores come every row is to be seen.
            fresh = self.resample or scores is not None or self.awaits_scores
            return self._walk(epoch if fresh else 0, np.flatnonzero(pool), size)
        epoch = epoch if self.resample else self.scored_epoch
        kept = scores.kept & pool
        if scores.even:
            return self._walk(epoch, np.flatnonzero(kept), size)
        rng = stream("quality draw", self.seed, epoch)
        drawn = draw(
            scores.quality,
            fraction=self.fraction,
            temperature=scores.temperature,
            rng=rng,
            strata=scores.strata,
            kept=kept,
        )
        return drawn if size == len(drawn) else drawn[np.sort(rng.permutation(len(drawn))[:size])]

    def from_trusted(self, epoch: int) -> Int[np.ndarray, " j"]:
        """The epoch's trusted rows, in the order in which they are trained on: one pass over them after another."""
        size = self._trusted_of(epoch)
        if size == 0:
            return np.empty(0, dtype=np.int64)
        if self.trusted_from is None:
            return self.rows + np.arange(size)
        first, place = self.trusted_from
        before = 0 if epoch == first else self.size - place + (epoch - first - 1) * self.size
        return self.rows + _stretch(before, size, self.trusted, lambda p: stream("trusted order", self.seed, p))

    def _trusted_of(self, epoch: int) -> int:
        """How many of the epoch's rows are trusted ones."""
        if self.trusted_from is None:
            return min(self.trusted, self.size)
        first, place = self.trusted_from
        return 0 if epoch < first else self.size - place if epoch == first else self.size

    def _pool(self) -> Bool[np.ndarray, " n"]:
        return np.ones(self.rows, dtype=np.bool_) if self.excluded is None else ~self.excluded

    def _walk(self, epoch: int, rows: np.ndarray, size: int) -> np.ndarray:
        """The epoch's stretch of an endless sequence of random orders of these rows; where they are few they repeat."""
        whole = self.size if self.trusted_from is not None else size
        return rows[_stretch(epoch * whole, size, len(rows), lambda p: stream("row order", self.seed, p))]


def _stretch(start: int, size: int, n: int, rng: Callable[[int], np.random.Generator]) -> Int[np.ndarray, " size"]:
    """`size` entries from `start` on, of an endless sequence of random orders of n."""
    if size == 0:
        return np.empty(0, dtype=np.int64)
    passes = range(start // n, (start + size - 1) // n + 1)
    return np.concatenate([rng(p).permutation(n) for p in passes])[start % n :][:size]


def trusted_steps(total: int, trusted: int, rows_a_step: int) -> int:
    """The steps at the end of a run that train on trusted rows: what is left of 0.7 of all, at least one pass over the
    trusted rows, at most half of all.

    >>> trusted_steps(440, 128, 16), trusted_steps(20, 128, 16), trusted_steps(100, 0, 16)
    (132, 8, 0)
    """
    if trusted == 0:
        return 0
    return min(max(total - math.ceil(POOL_SHARE * total), math.ceil(trusted / rows_a_step)), total // 2)


def sample(scores: Scores, fraction: float = 0.5, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Indices of a quality sample, ascending: `fraction` of the rows, as the first epoch by these scores has them.

    Rows are drawn without replacement by their probability, for classification with the classes' shares where Q
    decides; dropped rows never. Raises SettingsError for a fraction outside 0 < f ≤ 1, or of more rows than were kept.
    """
    plan = EpochPlan(len(scores), fraction, seed, scores=scores)
    require_enough(plan.size, kept=int(scores.kept.sum()), rows=len(scores))
    return np.sort(plan.draw(0))
