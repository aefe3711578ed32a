"""The epoch plan: which rows each epoch trains on; and a sample, which is its first epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tsqlora.auditing.scores import Scores
from tsqlora.errors import SettingsError
from tsqlora.libs.shapes import Bool, Int
from tsqlora.sampling import draw, draw_size, require_enough
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

    Trusted rows are numbered from `rows` on, and mixed in: each epoch includes all of them, or as many by turns as are
    half of its rows. A run that asks the pool has neither trusted nor held-out rows among its first `asks` rows; from
    there on it has trusted rows alone if the pool has contradicted them, else both are mixed in.

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
    held_out: Bool[np.ndarray, " n"] | None = None
    """Rows of the pool that come after the question."""
    asks: int | None = None
    """Rows of the run, over its epochs, before the answer to the question decides; None without a question."""
    contradicted: bool = False
    """The answer."""
    scores: Scores | None = None
    scored_epoch: int = 0
    """The first epoch that is drawn by scores."""
    awaits_scores: bool = False
    """Whether scores will follow: ranks wait for them."""

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

    def scored(self, scores: Scores, epoch: int) -> "EpochPlan":
        """Return the plan that draws by these scores from `epoch` on."""
        return replace(self.holding_out(scores), scores=scores, scored_epoch=epoch, awaits_scores=False)

    def unscored(self, *, awaits_scores: bool = False) -> "EpochPlan":
        """Return the plan that draws at random and has no question, for good or until scores follow."""
        plan = replace(self, held_out=None, asks=None, contradicted=False)
        return replace(plan, scores=None, scored_epoch=0, awaits_scores=awaits_scores)

    def holding_out(self, scores: Scores) -> "EpochPlan":
        """Return the plan with the rows that these scores hold out."""
        held = scores.left_out_as("held out")
        return replace(self, held_out=held if held.any() else None)

    def draw(self, epoch: int) -> Int[np.ndarray, " m"]:
        """Return the epoch's rows, unordered."""
        return np.concatenate(self.parts(epoch))

    def parts(self, epoch: int) -> list[Int[np.ndarray, " m"]]:
        """Return the rows before the question and those behind it, unordered; trusted ones alone in training order."""
        if self.asks is None:
            return [self._mixed(epoch, self.size)]
        left = self.asks - epoch * self.size
        before = min(max(left, 0), self.size)
        out = [mask for mask in (self.excluded, self.held_out) if mask is not None]
        pool = replace(self, trusted=0, excluded=np.logical_or.reduce(out) if out else None)
        after = self.size - before
        if self.contradicted:
            trusted = _stretch(max(-left, 0), after, self.trusted, lambda p: stream("trusted order", self.seed, p))
            return [pool._mixed(epoch, before), self.rows + trusted]
        return [pool._mixed(epoch, before), self._mixed(epoch, after)]

    def _mixed(self, epoch: int, size: int) -> Int[np.ndarray, " m"]:
        """Return so many rows of the epoch, unordered: those of the pool, then trusted ones."""
        most = min(self.trusted, self.size // 2)
        some = most * size // self.size
        trusted = _stretch(epoch * most, some, self.trusted, lambda p: stream("trusted order", self.seed, p))
        return np.concatenate([self._from_pool(epoch, size - some, self.size - most), self.rows + trusted])

    def _from_pool(self, epoch: int, size: int, whole: int) -> Int[np.ndarray, " j"]:
        """Return so many rows of the pool, unordered, of the `whole` that an epoch has."""
        scores = self.scores
        pool = np.ones(self.rows, dtype=np.bool_) if self.excluded is None else ~self.excluded

        def walk(epoch: int, rows: np.ndarray, size: int) -> np.ndarray:
            """A section of an endless sequence of random permutations of these rows."""
            return rows[_stretch(epoch * whole, size, len(rows), lambda p: stream("row order", self.seed, p))]

        if scores is None or epoch < self.scored_epoch:
            # Every row should be included until scores follow.
            fresh = self.resample or scores is not None or self.awaits_scores
            return walk(epoch if fresh else 0, np.flatnonzero(pool), size)
        epoch = epoch if self.resample else self.scored_epoch
        kept = (scores.kept if self.held_out is None else scores.kept | self.held_out) & pool
        if scores.even:
            return walk(epoch, np.flatnonzero(kept), size)
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
            return np.concatenate([drawn, walk(epoch, drawn, size - len(drawn))])
        return drawn if size == len(drawn) else drawn[np.sort(rng.permutation(len(drawn))[:size])]


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
