"""The epoch plan: which rows each epoch trains on; and a sample, which is its first epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tsqlora.compat.shapes import Bool, Int
from tsqlora.errors import SettingsError
from tsqlora.quality.sampling import draw, draw_size, require_enough
from tsqlora.quality.scores import Scores
from tsqlora.seeds import stream

POOL_SHARE = 0.7
"""Of a run's steps, those that train on the pool; the trusted rows have the rest."""
PASSES = 20
"""Most passes over the trusted rows: of a long run they take fewer steps than their share."""


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """The rows of every epoch, a pure function of (scores, seed, epoch).

    The pool is the training rows without copies of trusted rows. Before `scored_epoch`, and without scores, epochs walk
    through successive random permutations of the pool, so that a pass includes every row. Afterwards they walk through
    permutations of the kept rows if scores draw evenly, or sample by softmax(Q/τ).

    Trusted rows are numbered from `rows` on. Each epoch includes all of them, or as many by turns as are half of its
    rows; with `trusted_from` the run has none before that point and only trusted rows after it.

    Raises SettingsError for a fraction outside 0 < f ≤ 1 and for scores of another number of rows.
    """

    rows: int
    fraction: float = 0.5
    seed: int = 0
    resample: bool = True
    """Whether each epoch is a new draw; else the first draw by quality, or without scores the first of all, stays."""
    trusted: int = 0
    """Number of trusted rows."""
    excluded: Bool[np.ndarray, " n"] | None = None
    """Rows outside of the pool, because their input equals a trusted row's."""
    trusted_from: tuple[int, int] | None = None
    """Epoch and position from which on all rows are trusted ones."""
    scores: Scores | None = None
    scored_epoch: int = 0
    """The first epoch that is drawn by scores."""
    awaits_scores: bool = False
    """Whether scores will follow: ranks wait for them."""
    by: str | None = None
    """The callback that scores; None for scores that the user passed."""

    def __post_init__(self) -> None:
        draw_size(self.rows, self.fraction)
        if self.scores is not None and len(self.scores) != self.rows:
            raise SettingsError(f"there are {len(self.scores)} scores for {self.rows} rows")
        if self.excluded is not None and self.excluded.all():
            raise SettingsError(f"all {self.rows} training rows are also trusted rows; give other trusted rows")

    @property
    def size(self) -> int:
        """Rows per epoch."""
        return draw_size(self.rows, self.fraction)

    def scored(self, scores: Scores, epoch: int, *, by: str | None = None) -> "EpochPlan":
        """Return the plan that draws by these scores from `epoch` on."""
        return replace(self, scores=scores, scored_epoch=epoch, awaits_scores=False, by=by)

    def unscored(self, *, awaits_scores: bool = False, by: str | None = None) -> "EpochPlan":
        """Return the plan that draws at random, for good or until scores follow."""
        return replace(self, scores=None, scored_epoch=0, awaits_scores=awaits_scores, by=by)

    def draw(self, epoch: int) -> Int[np.ndarray, " m"]:
        """Return the epoch's rows, unordered: those of the pool, then trusted ones."""
        return np.concatenate([self.from_pool(epoch), self.from_trusted(epoch)])

    def from_pool(self, epoch: int) -> Int[np.ndarray, " j"]:
        """Return the epoch's rows of the pool, unordered."""
        size, scores = self.size - self._trusted_of(epoch), self.scores
        pool = np.ones(self.rows, dtype=np.bool_) if self.excluded is None else ~self.excluded
        if scores is None or epoch < self.scored_epoch:
            # Every row should be included until scores follow.
            fresh = self.resample or scores is not None or self.awaits_scores
            return self._walk(epoch if fresh else 0, np.flatnonzero(pool), size)
        epoch = epoch if self.resample else self.scored_epoch
        kept = scores.kept & pool
        if scores.even:
            return self._walk(epoch, np.flatnonzero(kept), size)
        rng = stream("quality draw", self.seed, epoch)
        drawn = draw(
            scores.quality,
            size=min(self.size, int(kept.sum())),
            temperature=scores.temperature,
            rng=rng,
            strata=scores.strata,
            kept=kept,
        )
        if len(drawn) < size:  # fewer rows are kept than an epoch has: they repeat, as in even draws
            return np.concatenate([drawn, self._walk(epoch, drawn, size - len(drawn))])
        return drawn if size == len(drawn) else drawn[np.sort(rng.permutation(len(drawn))[:size])]

    def from_trusted(self, epoch: int) -> Int[np.ndarray, " j"]:
        """Return the epoch's trusted rows in training order: one pass over them after another."""
        size = self._trusted_of(epoch)
        if size == 0:
            return np.empty(0, dtype=np.int64)
        if self.trusted_from is None:
            if size == self.trusted:
                return self.rows + np.arange(size)
            before = epoch * size
        else:
            first, place = self.trusted_from
            before = 0 if epoch == first else self.size - place + (epoch - first - 1) * self.size
        return self.rows + _stretch(before, size, self.trusted, lambda p: stream("trusted order", self.seed, p))

    def _trusted_of(self, epoch: int) -> int:
        """Return the number of trusted rows in an epoch."""
        if self.trusted_from is None:
            return min(self.trusted, self.size // 2)
        first, place = self.trusted_from
        return 0 if epoch < first else self.size - place if epoch == first else self.size

    def _walk(self, epoch: int, rows: np.ndarray, size: int) -> np.ndarray:
        """Return the epoch's section of an endless sequence of random permutations of these rows."""
        whole = self.size if self.trusted_from is not None else size
        return rows[_stretch(epoch * whole, size, len(rows), lambda p: stream("row order", self.seed, p))]


def _stretch(start: int, size: int, n: int, rng: Callable[[int], np.random.Generator]) -> Int[np.ndarray, " size"]:
    """Return `size` entries from `start` on of an endless sequence of random permutations of n."""
    if size == 0:
        return np.empty(0, dtype=np.int64)
    passes = range(start // n, (start + size - 1) // n + 1)
    return np.concatenate([rng(p).permutation(n) for p in passes])[start % n :][:size]


def trusted_steps(total: int, trusted: int, rows_a_step: int) -> int:
    """Return the steps at the end of a run that train on trusted rows.

    These are 30 % of the steps or 20 passes, whichever is less; at least one pass, and at most half of the steps.

    >>> trusted_steps(440, 128, 16), trusted_steps(18_750, 128, 16), trusted_steps(20, 128, 16), trusted_steps(9, 0, 16)
    (132, 160, 8, 0)
    """
    a_pass, share = math.ceil(trusted / rows_a_step), total - math.ceil(POOL_SHARE * total)
    return min(max(min(share, PASSES * trusted // rows_a_step), a_pass), total // 2)


def sample(scores: Scores, fraction: float = 0.5, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Draw a quality sample, the first epoch by these scores: `fraction` of the row indices, ascending.

    Kept rows are drawn without replacement by their probability; draws by Q preserve class shares. Raises SettingsError
    for a fraction outside 0 < f ≤ 1, or one that exceeds the kept rows.
    """
    plan = EpochPlan(len(scores), fraction, seed, scores=scores)
    require_enough(plan.size, kept=int(scores.kept.sum()), rows=len(scores))
    return np.sort(plan.draw(0))
