"""Fallback to even draws: is the model at chance, and would rows drawn by Q have more wrong labels than random ones?

The learned test compares the model's losses with those of a constant guess: gradients of a model at chance carry no
information. The guard (ours) compares the probability that labels are wrong, if wrong labels are evident
(`quality/label_noise.py`). Otherwise nothing judges Q: mean convergence misjudges it (docs/research/log.md).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora.compat.shapes import Bool, Float, Shaped
from tsqlora.compat.torch import double
from tsqlora.errors import TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.label_noise import doubts
from tsqlora.quality.rows import batches_of
from tsqlora.quality.sampling import draw_size, expected_inclusion
from tsqlora.quality.scores import Scores
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Collate, model_logits, precision, require_labels, split_labels

MARGIN = 2.0
"""Standard errors: by which the model's mean loss must beat a constant guess, and the guard's tolerance."""


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


@dataclass(frozen=True, slots=True)
class GuardTest:
    """A one-sided test of the rate of wrong labels of rows drawn by Q against random ones."""

    rows: int
    drawn: float
    """Expected rate of rows drawn by Q."""
    random: float
    """Rate of all kept rows."""
    standard_errors: float
    """By which rows drawn by Q are better."""

    @property
    def passed(self) -> bool:
        return self.standard_errors >= -MARGIN

    @property
    def message(self) -> str:
        return (
            f"the rate of wrong labels of rows drawn by Q would be {self.drawn:.1%}, of random ones {self.random:.1%}: "
            f"{-self.standard_errors:.1f} standard errors worse, and the guard allows {MARGIN:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        values = {"checked": True, **asdict(self), "passed": self.passed}
        return values if self.passed else {**values, "why": self.message}


def guarded(scores: Scores, fraction: float) -> tuple[Scores, GuardTest | None]:
    """Return the scores, drawn evenly if the test fails, with the result in the record; and the test.

    There is no test where rows are drawn evenly anyway, or where wrong labels are not evident.
    """
    if scores.even:
        return _noted(scores, {"checked": False, "why": "rows are drawn evenly: no Q decides"}), None
    logits = scores.predictions.get("logits") if scores.stratified else None
    doubt = None if logits is None else doubts(logits, scores.labels, frozen=scores.record.frozen)
    if doubt is None:
        return _noted(scores, {"checked": False, "why": "wrong labels are not evident"}), None
    size = min(draw_size(len(scores), fraction), int(scores.kept.sum()))
    chance = expected_inclusion(
        scores.quality, size=size, temperature=scores.temperature, strata=scores.strata, kept=scores.kept
    )
    test = guard_test(doubt, chance=chance, kept=scores.kept)
    noted = _noted(scores, test.to_dict())
    return noted if test.passed else noted.drawn_evenly(), test


def guard_test(
    doubt: Float[np.ndarray, " n"], *, chance: Float[np.ndarray, " n"], kept: Bool[np.ndarray, " n"]
) -> GuardTest:
    """Compare Σ q x / Σ q, where q is the probability that a row is drawn, with the mean of x over kept rows.

    x is the doubt about a label; standard errors are over rows.
    """
    x, q = doubt[kept], chance[kept]
    excess = len(x) * q / q.sum() - 1
    parts = excess * (x - x.mean())
    difference = float(parts.mean())
    error = float(parts.std()) / math.sqrt(len(x))
    # Not below rounding: an even draw would be infinitely many errors away.
    tiny = 1e-9 * float(np.abs(x).max(initial=0.0))
    errors = -difference / error if error > tiny else 0.0
    return GuardTest(len(x), float(x.mean()) + difference, float(x.mean()), errors)


def _noted(scores: Scores, guard: dict[str, Any]) -> Scores:
    return replace(scores, record=replace(scores.record, guard=guard))
