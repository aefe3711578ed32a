"""Fallback to even draws where the model is at chance.

The learned test compares the model's losses with those of a constant guess: gradients of a model at chance carry no
information.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora.compat.shapes import Float, Shaped
from tsqlora.compat.torch import double
from tsqlora.errors import TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.rows import batches_of
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Collate, model_logits, precision, require_labels, split_labels

MARGIN = 2.0
"""Standard errors by which the model's mean loss must beat a constant guess."""


@dataclass(frozen=True, slots=True)
class LearnedTest:
    """A one-sided paired test of the model's losses against those of a constant guess."""

    rows: int
    loss: float
    chance: float
    standard_errors: float

    @property
    def passed(self) -> bool:
        return self.standard_errors > MARGIN

    @property
    def message(self) -> str:
        """Why the test failed, with the numbers."""
        if self.chance < 1e-9:
            return f"all {self.rows} rows have the same label, so that a constant guess is perfect"
        return (
            f"the model's loss on {self.rows} rows is {self.loss:.4f}, a constant guess's is {self.chance:.4f}: "
            f"{self.standard_errors:.1f} standard errors below, and more than {MARGIN:g} are needed"
        )


def learned(losses: Float[Tensor, " n"], chance: Float[Tensor, " n"]) -> LearnedTest:
    """Return the mean of the paired differences chance − loss in standard errors.

    n is at least 2.  Raises TsqLoraError for losses that are not finite.
    """
    difference = double(chance - losses)
    require_finite(difference)
    mean = float(difference.mean())
    # Not below rounding: identical rows would be infinitely many errors away.
    error = max(float(difference.std()) / math.sqrt(len(difference)), 1e-9 * abs(mean))
    return LearnedTest(len(difference), float(losses.mean()), float(chance.mean()), mean / error if error else 0.0)


def require_finite(losses: Float[Tensor, " n"]) -> None:
    """Raise TsqLoraError where a loss is not finite."""
    if bad := int((~losses.isfinite()).sum()):
        raise TsqLoraError(
            f"{bad} of {len(losses)} losses are not finite; lower training.learning_rate or use another dtype"
        )


def against_chance(task: Answers, logits: Float[Tensor, "n k"], labels: Shaped[Tensor, "n *k"]) -> LearnedTest:
    """Test a model's losses against those of the best constant guess on the same rows."""
    constant = task.chance(labels, logits.shape[1]).to(logits.dtype).to(logits.device).expand_as(logits).contiguous()
    return learned(task.loss(logits, labels), task.loss(constant, labels))


def is_ready(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    *,
    task: Task,
    batch_size: int,
    autocast: torch.dtype | None,
) -> bool:
    """Whether a model's gradients on these rows carry information: it generates text, or beats a constant guess.

    Raises UnsupportedError or DataError for a model or rows without what the task's loss needs.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    with eval_mode(model), torch.no_grad():
        for batch in batches_of(rows, collate, batch_size):
            inputs, labels = split_labels(batch, model)
            require_labels(task, labels)
            with precision(labels.device, autocast, cache=False):
                parts.append((model_logits(model, inputs, task), labels))
            if not isinstance(task, Answers):
                break
    if not isinstance(task, Answers):
        return True
    logits, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return len(labels) > 1 and against_chance(task, logits, labels).passed
