"""Trusted rows; and for preference pairs the trusted model θ_R, the run's model trained on trusted pairs alone.

After RHO-loss (Mindermann et al. 2022) and CoLoR-Filter (Brandfonbrener et al. 2024).
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.compat.shapes import Bool, Float
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.rows import Dataset
from tsqlora.tasks import Batch, Collate, Task
from tsqlora.tasks.forward import precision, split_labels

STEPS = 24
RATES = (2.0, 1.0, 0.5)
"""Factors on the run's learning rate: lower ones are tried until the loss of held-out trusted rows rises."""
HELD_OUT = 0.2
"""Share of the trusted rows that are held out."""


@dataclass(frozen=True, slots=True, eq=False)
class Trusted:
    """Trusted rows, which represent what the model should be good at, and how to train on pairs of them alone."""

    rows: Dataset
    learning_rate: float = 5e-4
    """Learning rate of the run; the trusted model starts at twice as much."""
    batch_size: int = 16
    """Batch size of the run, and of the trusted model."""
    twins: Bool[np.ndarray, " n"] | None = None
    """Rows of the data set with the input of a trusted row; they are not drawn."""
    loss: Float[np.ndarray, " n"] | None = None
    """The trusted model's losses on the data set, if an earlier look measured them."""

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise SettingsError(f"{len(self.rows)} trusted rows are too few; give at least 2, better about 100")


class Lesson(NamedTuple):
    """What training the trusted model came to."""

    teaches: bool
    """False if no rate lowered the loss of pairs that the model had not seen."""
    trainings: int


@contextmanager
def trusted_model(
    model: nn.Module,
    trusted: Trusted,
    collate: Collate,
    *,
    task: Task,
    at_once: int | None = None,
    autocast: torch.dtype | None = None,
    rng: np.random.Generator,
) -> Generator[Lesson]:
    """Train the model on the trusted rows while open; afterwards restore it bit for bit, also after an error.

    AdamW without weight decay and dropout, at a rate that falls linearly to 0, in a new order for each pass over the
    rows; batches of more than `at_once` rows are accumulated. Weights, gradients, modes and random generators are
    restored. Raises TsqLoraError where a loss is not finite.
    """
    training = _Training(model, trusted, collate, task, at_once or len(trusted.rows), autocast, rng)
    before = [(p, p.detach().clone(), p.grad) for p in training.parameters]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value, gradient in before:
            parameter.copy_(value)
            parameter.grad = gradient

    with eval_mode(model):
        try:
            yield training.run_checked(restore)
        finally:
            restore()


@dataclass(frozen=True, slots=True)
class _Training:
    model: nn.Module
    trusted: Trusted
    collate: Collate
    task: Task
    at_once: int
    autocast: torch.dtype | None
    rng: np.random.Generator

    def run_checked(self, restore: Callable[[], None]) -> Lesson:
        """Train at ever lower rates until the loss of held-out rows rises: few rows are soon learned by heart."""
        order = self.rng.permutation(len(self.trusted.rows))
        held_out, rows = np.split(order, [math.ceil(HELD_OUT * len(order))])
        least, trainings, best = self.loss(held_out), 0, None
        for factor in RATES:
            restore()
            trainings += 1
            try:
                self.run(rows, factor)
                after = self.loss(held_out)
            except TsqLoraError:  # not finite: a lower rate may be
                continue
            if distributed.once(lambda after=after, least=least: after < least):
                least, best = after, [p.detach().clone() for p in self.parameters]
            elif best is not None:
                break
        restore()
        if best is None:
            return Lesson(False, trainings)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, best, strict=True):
                parameter.copy_(value)
        return Lesson(True, trainings)

    @torch.no_grad()
    def loss(self, rows: np.ndarray) -> float:
        """The mean loss of some trusted rows."""
        return float(torch.stack([self._losses(part)[0].sum() for part in self._parts(rows)]).sum()) / len(rows)

    @torch.enable_grad()
    def run(self, rows: np.ndarray, factor: float) -> None:
        """Train on some trusted rows, at a factor on the run's rate that falls linearly to 0."""
        n = len(rows)
        for parameter in self.parameters:
            parameter.grad = None
        rate = factor * self.trusted.learning_rate
        optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        size = min(n, self.trusted.batch_size)
        order = np.concatenate([self.rng.permutation(n) for _ in range(-(-STEPS * size // n))])
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        for step in range(STEPS):
            batch = rows[order[step * size : (step + 1) * size]]
            for part, share in zip(self._parts(batch), self._shares(batch), strict=True):
                loss = self.task.batch_loss(*self._losses(part))
                if not torch.isfinite(loss):
                    raise TsqLoraError(
                        f"the loss on trusted rows is {float(loss.detach())} at learning rate {rate:g}; lower "
                        "training.learning_rate, or check the rows of data.trusted"
                    )
                (loss * share).backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad(set_to_none=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[first : first + self.at_once] for first in range(0, len(rows), self.at_once)]

    def _shares(self, rows: np.ndarray) -> list[float]:
        """How much each part of a batch counts in its loss: by its rows, or by its tokens."""
        if len(rows) <= self.at_once:
            return [1.0]
        _, labels = self._batch(rows)
        losses = torch.zeros(len(rows), device=labels.device, requires_grad=True)
        (weights,) = torch.autograd.grad(self.task.batch_loss(losses, labels), losses)
        return [float(part.sum()) for part in weights.split(self.at_once)]

    def _batch(self, rows: np.ndarray) -> tuple[Batch, Tensor]:
        return split_labels(self.collate([self.trusted.rows[int(j)] for j in rows]), self.model)

    def _losses(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Losses and labels of some trusted rows."""
        inputs, labels = self._batch(rows)
        with precision(labels.device, self.autocast):
            return self.task.loss(self.task.reading.logits(self.model, inputs), labels), labels


def left_out(margin: Float[np.ndarray, " n"], least: int) -> Bool[np.ndarray, " n"]:
    """Return the rows with a negative margin, except the nearest to 0 where fewer than `least` rows would remain.

    >>> left_out(np.array([1.0, -2.0, -1.0, -3.0]), 2).tolist()
    [False, True, False, True]
    """
    out = margin < 0
    missing = least - int((~out).sum())
    if missing > 0:
        below = np.flatnonzero(out)
        out[below[np.argsort(-margin[below], kind="stable")[:missing]]] = False
    return out
