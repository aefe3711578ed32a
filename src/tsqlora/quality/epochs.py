"""Which rows each epoch trains on: an immutable plan, and a sample as its first epoch."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from tsqlora.errors import SettingsError
from tsqlora.quality.sampling import draw, draw_size, require_enough
from tsqlora.quality.scores import Scores
from tsqlora.seeds import stream


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """The rows of every epoch, a pure function of (scores, seed, epoch).

    Before `scored_epoch`, and without scores, epochs walk through successive random orders of all rows, so that a
    pass leaves none out. From then on they walk through orders of the kept rows where scores draw evenly, or sample
    by softmax(Q/τ).

    Raises SettingsError for a fraction outside 0 < f ≤ 1 and for scores of another number of rows.
    """

    rows: int
    fraction: float = 0.5
    seed: int = 0
    resample: bool = True
    """Whether each epoch is drawn afresh; else the first draw by quality, or without scores the first of all, stays."""
    scores: Scores | None = None
    scored_epoch: int = 0
    """The first epoch that scores decide."""
    awaits_scores: bool = False
    """Whether scoring is still to come: ranks wait for it."""
    by: str | None = None
    """The callback that scores, or will; None where scores were given by hand."""

    def __post_init__(self) -> None:
        draw_size(self.rows, self.fraction)
        if self.scores is not None and len(self.scores) != self.rows:
            raise SettingsError(f"there are {len(self.scores)} scores for {self.rows} rows")

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
        """The epoch's rows, in no particular order."""
        scores = self.scores
        if scores is None or epoch < self.scored_epoch:
            # Until scores come every row is to be seen.
            fresh = self.resample or scores is not None or self.awaits_scores
            return self._walk(epoch if fresh else 0, np.arange(self.rows))
        epoch = epoch if self.resample else self.scored_epoch
        if scores.even:
            return self._walk(epoch, np.flatnonzero(scores.kept))
        return draw(
            scores.quality,
            fraction=self.fraction,
            temperature=scores.temperature,
            rng=stream("quality draw", self.seed, epoch),
            strata=scores.strata,
            kept=scores.kept,
        )

    def _walk(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """The epoch's stretch of an endless sequence of random orders of these rows; where they are few they repeat."""
        n, start = len(rows), epoch * self.size
        passes = range(start // n, (start + self.size - 1) // n + 1)
        orders = [stream("row order", self.seed, p).permutation(n) for p in passes]
        return rows[np.concatenate(orders)[start % n :][: self.size]]


def sample(scores: Scores, fraction: float = 0.5, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Indices of a quality sample, ascending: `fraction` of the rows, as the first epoch by these scores has them.

    Rows are drawn without replacement by their probability, for classification with the classes' shares where Q
    decides; dropped rows never. Raises SettingsError for a fraction outside 0 < f ≤ 1, or of more rows than were kept.
    """
    plan = EpochPlan(len(scores), fraction, seed, scores=scores)
    require_enough(plan.size, kept=int(scores.kept.sum()), rows=len(scores))
    return np.sort(plan.draw(0))
