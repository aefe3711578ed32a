"""The share of a data set that an epoch trains on, and the trusted rows that a run ends with."""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tsqlora.data.batches import bucketed_order
from tsqlora.errors import SettingsError
from tsqlora.quality.epochs import EpochPlan
from tsqlora.quality.rows import Dataset as Rows
from tsqlora.quality.rows import held, input_of, lengths_of
from tsqlora.quality.scores import Scores
from tsqlora.seeds import stream
from tsqlora.tasks import Task


class QualitySubset(Dataset[Any]):
    """A map-style data set of fixed length whose rows follow its `plan` from epoch to epoch.

    A draw is a pure function of (scores, seed, epoch): an epoch entered again after a crash has the same rows.
    To draw otherwise, set `plan` to another EpochPlan before the epoch begins.

    Args:
        dataset: any map-style data set.
        fraction: share of its rows that an epoch has, 0 < fraction ≤ 1.
        trusted: rows that look like what the model shall be good at, made as the data set's are; 32 to 200 are enough.
            An epoch stays as long as it is; with QualityCallback the last 30 % of a run train on them alone.
        resample: as in EpochPlan.
        lengths, batch_size: tokens of every row, and the Trainer's batch size; then rows of
            like length stand together, for a Trainer that samples sequentially.
    """

    def __init__(
        self,
        dataset: Any,
        fraction: float = 0.5,
        seed: int = 0,
        *,
        trusted: Rows | None = None,
        resample: bool = True,
        lengths: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(dataset, Mapping):
            raise SettingsError(
                f"QualitySubset got a {type(dataset).__name__} of {', '.join(map(str, dataset))}; give it one data set "
                "of them, such as data['train']"
            )
        if not isinstance(dataset, Rows):
            raise SettingsError(
                f"QualitySubset got a {type(dataset).__name__}, which has no length or no rows by number: rows of a "
                "stream cannot be drawn; give a list or a map-style data set"
            )
        if len(dataset) == 0:
            raise SettingsError("there are no rows to draw from")
        if (lengths is None) != (batch_size is None):
            raise SettingsError("give QualitySubset both lengths and batch_size, or neither")
        if lengths is not None and len(lengths) != len(dataset):
            raise SettingsError(f"there are {len(lengths)} lengths for {len(dataset)} rows")
        self.dataset = dataset
        self.trusted: Rows = () if trusted is None else trusted
        self.plan = EpochPlan(
            len(dataset), fraction, seed, resample, trusted=len(self.trusted), excluded=equals(dataset, self.trusted)
        )
        self.lengths, self.batch_size = lengths, batch_size
        if lengths is not None and len(self.trusted):
            self.lengths = [*lengths, *lengths_of(self.trusted)]
        self.task: Task | None = None
        """Training's own loss, where QualityCallback was given it: the first ranks follow it, too."""
        self.drawn_by: str | None = None
        """The callback that draws in the training that is under way."""
        self._listeners: list[Callable[[list[int]], None]] = []
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.plan.size

    def __getitem__(self, index: int) -> Any:
        row = int(self.indices[index])
        for listener in self._listeners:
            listener([row])
        return self._row(row)

    def row_at(self, index: int) -> Any:
        """The row at a place of the epoch, without telling anybody that it is handed out."""
        return self._row(int(self.indices[index]))

    def _row(self, row: int) -> Any:
        rows = len(self.dataset)
        return self.dataset[row] if row < rows else self.trusted[row - rows]

    @contextmanager
    def announcing(self, listener: Callable[[list[int]], None]) -> Generator[None]:
        """While open, the listener is told each row that is handed out, in this process."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    @property
    def scores(self) -> Scores | None:
        """What rows are drawn by; None while they are drawn at random."""
        return self.plan.scores

    @property
    def trusted_hash(self) -> str | None:
        """16 hex digits that name the trusted rows; None where there are none."""
        if not len(self.trusted):
            return None
        digest = hashlib.sha256()
        for j in range(len(self.trusted)):
            digest.update(repr(held(self.trusted[j])).encode())
        return digest.hexdigest()[:16]

    def use(self, scores: Scores, epoch: int) -> None:
        """From `epoch` on, rows are drawn by these scores."""
        self.plan = self.plan.scored(scores, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch, for a custom loop.

        accelerate calls it, too, for each loader over this data set, an evaluation's as well; raises SettingsError
        where a callback draws and is in another epoch.
        """
        if self.drawn_by is not None and epoch != self.epoch:
            raise SettingsError(
                f"set_epoch({epoch}): {self.drawn_by} draws this QualitySubset and is in epoch {self.epoch}; to "
                "evaluate on training rows give a data set of its own, torch.utils.data.Subset(rows, data.draw(0)); "
                "after a training that failed set data.drawn_by to None"
            )
        self._draw(epoch)

    def begin_epoch(self, epoch: int, by: str) -> None:
        """The same for a callback, which alone draws from now on, until it sets `drawn_by` to None."""
        self.drawn_by = by
        self._draw(epoch)

    def _draw(self, epoch: int) -> None:
        self.epoch, self.indices = epoch, self.draw(epoch)

    def draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in the order in which they are trained on; trusted ones are numbered from the last."""
        rows, trusted = self.plan.from_pool(epoch), self.plan.from_trusted(epoch)
        if self.plan.trusted_from is None:
            rows, trusted = np.concatenate([rows, trusted]), trusted[:0]
        return np.concatenate([self._in_order(rows, stream("epoch order", self.plan.seed, epoch)), trusted])

    def _in_order(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.lengths is None or self.batch_size is None or len(rows) == 0:
            return rows[rng.permutation(len(rows))]
        lengths = [self.lengths[row] for row in rows]
        return rows[bucketed_order(lengths, batch_size=self.batch_size, rng=rng)]


def equals(dataset: Rows, others: Rows) -> np.ndarray | None:
    """Which rows of the data set have the input of one of the others, whatever their label; None where none has."""
    inputs = {input_of(others[j]) for j in range(len(others))} - {None}
    if not inputs:
        return None
    mask = np.array([input_of(dataset[j]) in inputs for j in range(len(dataset))])
    return mask if mask.any() else None
