"""A model with a fitted head: what it makes of the rows, and how the head is put in and out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora.compat.shapes import Float
from tsqlora.quality.agreement import Agreement, agreement
from tsqlora.quality.fallback import against_chance
from tsqlora.quality.forward_pass import ACTIVATIONS, Forward, Head
from tsqlora.quality.linear_head import HeadFit, Kind, LinearHead, row_losses
from tsqlora.quality.passes import empty
from tsqlora.quality.ridge import ROWS_AT_ONCE, Ridge, fit_classes, fit_ridge, fit_temperature
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.multi_label import MultiLabel
from tsqlora.tasks.regression import Regression

LEAST_TRUSTED = 8
"""Fit no head on fewer trusted rows."""
LEAST_P = 1e-3
"""Least probability of a label by least squares, whose predictions may lie outside of 0 and 1."""
TRAINING_SCALE = 0.5
"""Factor on a fitted head when training starts (docs/method.md), which changes no class, label, tag or order of
numbers. Heads of trusted rows keep their scale, since the pool overwrites a small head sooner; so does a head of
numbers without a bias, which cannot keep their mean."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadStart:
    """The fitted head, and a whitened layer before it if that has the lower loss."""

    fit: HeadFit
    present: float
    """Mean loss of the model's own head on the same rows."""
    replaces: bool
    """Whether the fitted head's out-of-fold loss is lower by 2 standard errors."""
    dense: LinearHead | None = None
    trusted: bool = False
    """Whether the head was fitted on trusted rows."""
    training_scale: float = 1.0
    """Factor on the fitted head when training starts."""

    def summary(self) -> dict[str, float | int | bool]:
        """Summarise the head start for the record and the report."""
        return {
            "replaced": self.replaces,
            "out_of_fold_loss": self.fit.loss,
            "present_loss": self.present,
            "rows": len(self.fit.rows),
            "strength": self.fit.strength,
            "scale": self.fit.scale,
            "training_scale": self.training_scale,
            "whitened": self.dense is not None,
            "trusted": self.trusted,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """A model with a fitted head, and the forward passes, which only the first process has."""

    head: HeadStart | None
    """None if the model has no head to fit."""
    of_trusted: HeadStart | None
    """The head fitted on trusted rows alone."""
    layer: Head | None
    pool: Forward | None
    trusted: Forward | None
    undo: Callable[[], None] = lambda: None
    """Restores the model's own head."""

    @property
    def logits(self) -> np.ndarray | None:
        """Logits of every row with the head that it is scored with; None for generation."""
        if self.pool is None or self.pool.logits is None:
            return None
        if self.head is None or not self.head.replaces:
            return self.pool.logits.astype(np.float32)  # large columns are in half precision
        return self.head.fit.head.logits(self._features(self.pool)).astype(np.float32)

    @torch.no_grad()
    def ready_to_train(self) -> None:
        """Scale the installed head for training, once all rows are scored."""
        if self.head is None or not self.head.replaces:
            return
        assert self.layer is not None
        scale, linear = self.head.training_scale, self.layer.linear
        linear.weight.mul_(scale)
        if linear.bias is not None:
            linear.bias.mul_(scale).add_((1 - scale) * self.head.fit.middle)

    def ridge(self, task: Task) -> Ridge | None:
        """Fit the answers on features in closed form, with leave-one-out predictions; None without features."""
        pool = self.pool
        if pool is None or pool.features is None or len(pool.labels) < 3 or self.layer is None:
            return None
        if isinstance(task, Classification) and len(np.unique(pool.labels)) > 1:
            return fit_classes(self._features(pool), pool.labels, self.layer.linear.out_features)
        if isinstance(task, Regression):
            return fit_ridge(self._features(pool), pool.labels[:, None].astype(np.float64))
        if isinstance(task, MultiLabel):
            return fit_ridge(self._features(pool), pool.labels.astype(np.float64))
        return None

    def agreement(self, ridge: Ridge, task: Task) -> Agreement | None:
        """Whether trusted rows have the answers that a fit on the pool predicts; None for too few."""
        pool, few = self.pool, self.trusted
        if pool is None or few is None or few.features is None or len(few.labels) < LEAST_TRUSTED:
            return None
        return agreement(ridge, pool.labels, self._features(few), few.labels, task)

    def why_not(self, task: Task) -> str | None:
        """Explain why the model is at chance; None if its losses beat a constant guess."""
        pool, logits = self.pool, self.logits
        if pool is None or logits is None or not isinstance(task, Answers) or len(pool.labels) < 2:
            return None
        labels = torch.from_numpy(pool.labels)
        test = against_chance(task, torch.from_numpy(logits), labels)
        if not test.passed and isinstance(task, Classification):
            # An overconfident model, or one trained on correct labels among wrong ones, is not at chance.
            logits = (logits / fit_temperature(logits, pool.labels)).astype(np.float32)
            test = against_chance(task, torch.from_numpy(logits), labels)
        return None if test.passed else test.message

    def teaches(self, task: Task) -> bool:
        """Whether a head fitted on trusted rows beats class frequencies, by out-of-fold losses."""
        own, trusted = self.of_trusted, self.trusted
        if own is None or trusted is None or not isinstance(task, Answers):
            return False
        labels = torch.from_numpy(trusted.labels)
        width = 1 if trusted.logits is None else trusted.logits.shape[1]
        constant = np.tile(task.chance(labels, width).numpy(), (len(labels), 1))
        return own.fit.better_than(row_losses(constant, trusted.labels, head_kind(task)))

    def _features(self, forward: Forward) -> np.ndarray:
        """The inputs of the last linear layer with the installed head."""
        assert forward.features is not None
        assert self.layer is not None
        return forward.features if self.head is None else features_with(self.head, forward, self.layer)


def unseen(ridge: Ridge, task: Task) -> Float[np.ndarray, "n k"]:
    """Predict each row by a fit without it: logits of classes or labels, or a number."""
    if isinstance(task, MultiLabel):
        p = ridge.left_out.clip(LEAST_P, 1 - LEAST_P)
        return np.log(p / (1 - p))
    return ridge.left_out


def head_kind(task: Task) -> Kind:
    """Return the kind of targets that the task's head is fitted on."""
    if isinstance(task, MultiLabel):
        return "labels"
    return "classes" if isinstance(task, Classification) else "numbers"


def features_with(start: HeadStart, forward: Forward, layer: Head) -> Float[np.ndarray, "n d"]:
    """Return the inputs of the last linear layer once the head start is installed."""
    assert forward.features is not None
    if start.dense is None or forward.dense is None or not start.replaces:
        return forward.features
    features = empty(forward.features.shape, np.dtype(np.float32))
    for first in range(0, len(features), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        outputs = torch.from_numpy(start.dense.logits(forward.dense[rows]))
        features[rows] = ACTIVATIONS[layer.activation](outputs).numpy()
    return features


@torch.no_grad()
def install(head: Head, start: HeadStart) -> Callable[[], None]:
    """Write the fitted weights into the layers in place; return a function that restores the former ones."""
    parts: list[tuple[nn.Linear | None, np.ndarray, np.ndarray]] = [
        (head.linear, start.fit.head.weight, start.fit.head.bias)
    ]
    if start.dense is not None:
        parts.append((head.dense, start.dense.weight, start.dense.bias))
    before: list[tuple[Tensor, Tensor]] = []
    for layer, weight, bias in parts:
        assert layer is not None
        for parameter, value in ((layer.weight, weight), (layer.bias, bias)):
            if parameter is not None:
                before.append((parameter, parameter.detach().clone()))
                parameter.copy_(torch.from_numpy(value))

    @torch.no_grad()
    def undo() -> None:
        for parameter, value in before:
            parameter.copy_(value)

    return undo
