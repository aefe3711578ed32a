"""The share of a data set that an epoch trains on: random at first, by quality once scored."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tsqlora.data.batches import bucketed_order
from tsqlora.errors import SettingsError
from tsqlora.quality.sampling import draw, draw_size
from tsqlora.quality.scores import Scores


class QualitySubset(Dataset[Any]):
    """A map-style data set of a fixed length whose rows are drawn anew each epoch.

    Before scores are known an epoch is the next stretch of a random order of all rows, so
    that a pass over them leaves none out; afterwards the same of the rows that scores keep, or a
    sample by their softmax, as the scores say. A draw is a pure
    function of (scores, seed, epoch): an epoch entered again after a crash has the same rows.

    Args:
        dataset: any map-style data set.
        fraction: share of its rows that an epoch has, 0 < fraction ≤ 1.
        resample: draw anew each epoch; else the first quality draw is kept.
        lengths, batch_size: tokens of every row, and the Trainer's batch size; then rows of
            like length stand together, for a Trainer that samples sequentially.
    """

    def __init__(
        self,
        dataset: Any,
        fraction: float = 0.5,
        seed: int = 0,
        *,
        resample: bool = True,
        lengths: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise SettingsError("there are no rows to draw from")
        if (lengths is None) != (batch_size is None):
            raise SettingsError("give QualitySubset both lengths and batch_size, or neither")
        if lengths is not None and len(lengths) != len(dataset):
            raise SettingsError(f"there are {len(lengths)} lengths for {len(dataset)} rows")
        self.dataset = dataset
        self.fraction = fraction
        self.seed = seed
        self.resample = resample
        self.lengths = lengths
        self.batch_size = batch_size
        self.scores: Scores | None = None
        self.scored_epoch = 0
        self.awaits_scores = False
        """Set by QualityCallback while scoring is still to come: ranks wait for it."""
        self.announce: Callable[[list[int]], None] | None = None
        """Told each row that is handed out, in this process."""
        self.size = draw_size(len(dataset), fraction)
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        row = int(self.indices[index])
        if self.announce is not None:
            self.announce([row])
        return self.dataset[row]

    def use(self, scores: Scores, epoch: int) -> None:
        """From `epoch` on, rows are drawn by these scores."""
        if len(scores) != len(self.dataset):
            raise SettingsError(f"there are {len(scores)} scores for {len(self.dataset)} rows")
        self.scores, self.scored_epoch = scores, epoch

    def set_epoch(self, epoch: int) -> None:
        """Draws the rows of an epoch."""
        self.indices = self.draw(epoch)

    def draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in the order in which they are trained on."""
        if self.scores is None or epoch < self.scored_epoch:
            rows = self._stretch(epoch, np.arange(len(self.dataset)))
        elif self.scores.even:
            # Of kept rows what the control has of all; where there are fewer than an epoch holds, they repeat.
            rows = self._stretch(epoch if self.resample else self.scored_epoch, np.flatnonzero(self.scores.kept))
        else:
            rng = np.random.default_rng([self.seed, 2, epoch if self.resample else self.scored_epoch])
            rows = draw(
                self.scores.quality,
                fraction=self.fraction,
                temperature=self.scores.temperature,
                rng=rng,
                strata=self.scores.strata,
                kept=self.scores.kept,
            ).indices
        rng = np.random.default_rng([self.seed, 3, epoch])
        if self.lengths is None or self.batch_size is None:
            return rng.permutation(rows)
        lengths = [self.lengths[row] for row in rows]
        return rows[bucketed_order(lengths, batch_size=self.batch_size, rng=rng)]

    def _stretch(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """The epoch's part of an endless row of random orders of these rows."""
        n, start = len(rows), epoch * self.size
        passes = range(start // n, (start + self.size - 1) // n + 1)
        orders = [np.random.default_rng([self.seed, 1, p]).permutation(n) for p in passes]
        return rows[np.concatenate(orders)[start % n :][: self.size]]
