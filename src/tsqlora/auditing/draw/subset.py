"""QualitySubset: the part of a data set that an epoch trains on, and trusted rows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tsqlora.auditing.draw.epochs import EpochPlan
from tsqlora.auditing.scores import Scores
from tsqlora.errors import SettingsError
from tsqlora.model.eval_mode import same_randomness
from tsqlora.rows.batches import bucketed_order
from tsqlora.rows.datasets import REVIEWED_AS, content_of, has_answer, input_of, lengths_of
from tsqlora.rows.datasets import Dataset as Rows
from tsqlora.seeds import stream
from tsqlora.tasks import Task


class QualitySubset(Dataset[Any]):
    """A map-style data set of fixed length whose rows follow its `plan` from epoch to epoch.

    A draw is a pure function of (scores, seed, epoch), so an epoch has the same rows after a crash. For another
    draw, set `plan` to another EpochPlan before the epoch begins.

    Args:
        dataset: any map-style data set.
        fraction: share of its rows per epoch, 0 < fraction ≤ 1.
        seed: of the draws and their order; by default 0, and in a Trainer with a callback its TrainingArguments.seed.
        trusted: checked rows of the kind that the model must handle well, in the format of the data set; about 100 are
            enough. They do not change the length of an epoch. With QualityCallback a run trains on them last if the
            pool contradicts them. Of rows that `tsqlora apply` wrote, the field
            `reviewed_as` says which were suspects: hard rows, which the question leaves out.
        resample: as in EpochPlan.
        lengths, batch_size: tokens of every row, and the Trainer's batch size; they group rows of similar length, for a
            Trainer that samples sequentially.
    """

    def __init__(
        self,
        dataset: Any,
        fraction: float = 0.5,
        seed: int | None = None,
        *,
        trusted: Rows | None = None,
        resample: bool = True,
        lengths: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(dataset, Mapping):
            raise SettingsError(
                f"QualitySubset got a {type(dataset).__name__} of {', '.join(map(str, dataset))}; pass one of them, as "
                "data['train']"
            )
        if not isinstance(dataset, Rows):
            raise SettingsError(
                f"QualitySubset got a {type(dataset).__name__}, which has no length or no rows by number; pass a list "
                "or a map-style data set; of a stream the rows that fit: "
                "datasets.Dataset.from_list(list(stream.take(n)))"
            )
        if len(dataset) == 0:
            raise SettingsError("there are no rows to draw from")
        if (lengths is None) != (batch_size is None):
            raise SettingsError("pass both lengths and batch_size to QualitySubset, or neither")
        if lengths is not None and len(lengths) != len(dataset):
            raise SettingsError(f"there are {len(lengths)} lengths for {len(dataset)} rows")
        self.dataset = dataset
        self.trusted: Rows = () if trusted is None else trusted
        self.seed = seed
        self.plan = EpochPlan(
            len(dataset),
            fraction,
            seed or 0,
            resample,
            trusted=len(self.trusted),
            excluded=equals(dataset, self.trusted),
        )
        self.lengths, self.batch_size = lengths, batch_size
        if lengths is not None and len(self.trusted):
            self.lengths = [*lengths, *lengths_of([self.trusted[j] for j in range(len(self.trusted))])]
        self.trusted_hash = hash_of(self.trusted)
        """Of the trusted rows, 16 hex digits; None without trusted rows, and where they differ at each reading."""
        self.suspects = suspects_of(self.trusted)
        """Which trusted rows were reviewed because they seemed wrong: hard ones, which answer no question."""
        self.task: Task | None = None
        """The task that QualityCallback was given; first ranks use its loss, too."""
        self.drawn_by: str | None = None
        """The callback that draws in the current training."""
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.plan.size

    def __getitem__(self, index: int) -> Any:
        row, rows = int(self.indices[index]), len(self.dataset)
        return self.dataset[row] if row < rows else self.trusted[row - rows]

    @property
    def scores(self) -> Scores | None:
        """The scores that rows are drawn by; None for random draws."""
        return self.plan.scores

    def use(self, scores: Scores, epoch: int) -> None:
        """Draw rows by these scores from `epoch` on."""
        self.plan = self.plan.scored(scores, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch, for a custom loop.

        accelerate calls it too, for every loader over this data set, including evaluation. Raises SettingsError where a
        callback draws and is in another epoch.
        """
        if self.drawn_by is not None and epoch != self.epoch:
            raise SettingsError(
                f"set_epoch({epoch}): {self.drawn_by} draws this QualitySubset and is in epoch {self.epoch}; to "
                "evaluate on training rows pass a separate torch.utils.data.Subset(rows, data.draw(0)); after a failed "
                "training set data.drawn_by to None"
            )
        self._draw(epoch)

    def begin_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch for QualityCallback, which alone draws until it sets `drawn_by` to None."""
        self.drawn_by = "QualityCallback"
        self._draw(epoch)

    def answer(self, *, contradicted: bool) -> None:
        """Set the answer of the pool, also for the loader's workers, which have read no row behind the question."""
        self.plan = replace(self.plan, contradicted=contradicted)
        self.places.copy_(torch.from_numpy(self.draw(self.epoch)))

    @property
    def indices(self) -> np.ndarray:
        """The rows of the epoch, in training order."""
        return self.places.numpy()

    def _draw(self, epoch: int) -> None:
        self.epoch, self.places = epoch, torch.from_numpy(self.draw(epoch))
        if self.plan.asks is not None:
            self.places.share_memory_()

    def draw(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in training order; trusted rows are numbered after the data set's."""
        rng = stream("epoch order", self.plan.seed, epoch)
        return np.concatenate([self._ordered(rows, rng) for rows in self.plan.parts(epoch)])

    def _ordered(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(rows) == 0 or rows.min() >= self.plan.rows:  # trusted rows alone have their order
            return rows
        if self.lengths is None or self.batch_size is None:
            return rows[rng.permutation(len(rows))]
        return rows[bucketed_order([self.lengths[row] for row in rows], batch_size=self.batch_size, rng=rng)]


def undrawn(rows: Any) -> Any:
    """Return all rows: those that a QualitySubset draws from, else the rows themselves."""
    return rows.dataset if isinstance(rows, QualitySubset) else rows


def hash_of(rows: Rows) -> str | None:
    """Return a hash of the rows, 16 hex digits; None without rows, and where a transform draws by its own generator."""

    def digest() -> str | None:
        # A random transform, as augmentation is, must give the same rows to a resumed run.
        with same_randomness(seed=0):
            some = [content for j in range(len(rows)) if (content := content_of(rows[j])) is not None]
        return hashlib.sha256(repr(some).encode()).hexdigest()[:16] if some else None

    once = digest()
    return once if once == digest() else None


def suspects_of(rows: Rows) -> np.ndarray:
    """Return which rows were reviewed as suspects."""
    return np.array([isinstance(r, Mapping) and r.get(REVIEWED_AS) == "suspect" for r in _alike(rows)], dtype=np.bool_)


PLACES = 64
"""Rows that recognise a data set."""


def hash_of_some(rows: Rows) -> str | None:
    """Return a hash of evenly spaced rows in order, 16 hex digits.

    None where no row can be hashed, and where reading a row again gives another one, as augmentation does.
    """
    places = np.linspace(0, len(rows) - 1, min(len(rows), PLACES)).astype(int)

    def content(row: Any) -> Any:
        has_file = isinstance(row, Mapping) and "content" in row  # its path may change
        return content_of({name: value for name, value in row.items() if name != "file"} if has_file else row)

    once, again = ([content(rows[int(j)]) for j in places] for _ in range(2))
    some = [content for content in once if content is not None]
    return hashlib.sha256(repr(some).encode()).hexdigest()[:16] if some and once == again else None


def equals(dataset: Rows, others: Rows) -> np.ndarray | None:
    """Return which rows have the same input as one of the others, whatever the label; None where none has.

    A prompt to which the others have several answers, such as "Write a headline", makes a row the same by its answer.
    Tables of `datasets` are read without their transform, and other rows with the same random numbers each.
    """
    plain = all(hasattr(rows, "with_format") for rows in (dataset, others))
    answers = dict[Any, set[Any]]()
    for row in _alike(others, plain=plain):
        answers.setdefault(input_of(row), set()).add(content_of(row))
    answers.pop(None, None)
    if not answers:
        return None

    def same(row: Any) -> bool:
        theirs = answers.get(input_of(row), set())
        return bool(theirs) and (len(theirs) == 1 or not has_answer(row) or content_of(row) in theirs)

    mask = np.array([same(row) for row in _alike(dataset, plain=plain)])
    return mask if mask.any() else None


def inputs_of(dataset: Rows) -> np.ndarray:
    """Return a number for the input of each row, the same for copies, whatever the label."""
    numbers = dict[Any, int]()
    inputs = ((j, input_of(row)) for j, row in enumerate(_alike(dataset)))
    return np.array([numbers.setdefault(j if row is None else hash(row), j) for j, row in inputs], dtype=np.int64)


def _alike(rows: Rows, *, plain: bool = True) -> Iterator[Any]:
    """Yield the rows; where a transform draws random numbers, the same ones for each, and of a `plain` table none."""
    table: Any = rows
    rows = table.with_format(None) if plain and hasattr(rows, "with_format") else rows
    random = len(rows) > 0 and content_of(rows[0]) != content_of(rows[0])
    for j in range(len(rows)):
        with same_randomness(seed=0) if random else nullcontext():
            row = rows[j]
        yield row
