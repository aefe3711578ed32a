"""The look's first pass: a fitted head, and what it tells of every row.  METHOD 1.1."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.quality.features import Head
from tsqlora.quality.forward_pass import Forward, forward_pass
from tsqlora.quality.head_start import HeadStart, features_with, fit_start, install, of_trusted
from tsqlora.quality.learned import against_chance, require_finite
from tsqlora.quality.linear_head import Kind, row_losses
from tsqlora.quality.ridge import fit_ridge, fit_temperature, leave_one_out_logits
from tsqlora.quality.rule import LookRequest
from tsqlora.seeds import stream
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.regression import Regression

ROWS_TO_FIT = 50_000
"""A head is fitted on at most so many rows, drawn evenly: more hardly change it, and their features need not fit."""
LEAST_TRUSTED = 8
"""With fewer trusted rows no head is fitted on them."""


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """A model whose head is fitted, and the passes that told; passes are the first process's alone."""

    head: HeadStart | None
    """None where there was nothing to fit."""
    of_trusted: HeadStart | None
    """Fitted on trusted rows alone."""
    layer: Head | None
    pool: Forward | None
    trusted: Forward | None
    undo: Callable[[], None] = lambda: None
    """Puts the model's own head back."""

    @property
    def logits(self) -> np.ndarray | None:
        """Of every row, by the model as it is now; None of text."""
        if self.pool is None or self.pool.logits is None:
            return None
        if self.head is None or not self.head.replaces:
            return self.pool.logits.astype(np.float32)  # a large column is in half precision
        return self.head.fit.head.logits(self._features()).astype(np.float32)

    def unseen(self, task: Task) -> np.ndarray | None:
        """What a fit that has not seen the row says of it: logits of classes, or a number; None without features."""
        pool = self.pool
        if pool is None or pool.features is None or len(pool.labels) < 3 or self.layer is None:
            return None
        if isinstance(task, Classification) and len(np.unique(pool.labels)) > 1:
            return leave_one_out_logits(self._features(), pool.labels, self.layer.linear.out_features)
        if isinstance(task, Regression):
            return fit_ridge(self._features(), pool.labels[:, None].astype(np.float64)).left_out
        return None

    def why_not(self, task: Task) -> str | None:
        """Why the model is at chance: its losses on all rows are no better than a constant guess's."""
        pool, logits = self.pool, self.logits
        if pool is None or logits is None or not isinstance(task, Answers) or len(pool.labels) < 2:
            return None
        labels = torch.from_numpy(pool.labels)
        test = against_chance(task, torch.from_numpy(logits), labels)
        if not test.passed and isinstance(task, Classification):
            # A model that is too sure of itself, or trained on right labels among wrong ones, is not at chance.
            logits = (logits / fit_temperature(logits, pool.labels)).astype(np.float32)
            test = against_chance(task, torch.from_numpy(logits), labels)
        return None if test.passed else test.told

    def teaches(self, task: Task) -> bool:
        """Whether trusted rows teach anything beyond class frequencies, by losses out of fold."""
        own, apart = self.of_trusted, self.trusted
        if own is None or apart is None or not isinstance(task, Answers):
            return False
        labels = torch.from_numpy(apart.labels)
        width = 1 if apart.logits is None else apart.logits.shape[1]
        constant = np.tile(task.chance(labels, width).numpy(), (len(labels), 1))
        return own.fit.better_than(row_losses(constant, apart.labels, _kind(task)))

    def _features(self) -> np.ndarray:
        """What the last linear layer is given now."""
        assert self.pool is not None
        assert self.pool.features is not None
        assert self.layer is not None
        return self.pool.features if self.head is None else features_with(self.head, self.pool, self.layer)


def start_head(model: nn.Module, request: LookRequest) -> Started:
    """Fit the task's last linear layer on the features that it is given, and install it where it is better.

    One forward pass without dropout over all rows, and over the trusted ones; the first process fits. The head is
    fitted on the rows, or on the trusted rows, whichever loses less on these.
    """
    rule, task, trusted, compute = request.rule, request.task, request.trusted, request.compute
    passing = partial(forward_pass, model, collate=request.collate, task=task)
    names = {"lengths": request.rows.lengths, "hashes": request.rows.hashes}
    pool, layer = passing(request.dataset, compute=compute, **names)
    apart = None
    if trusted is not None:
        apart, _ = passing(trusted.rows, compute=replace(compute, journal=None, progress=None))
    trusts = rule.trusts and trusted is not None and trusted.loss is None
    if layer is None or not isinstance(task, Classification | Regression) or not (rule.head_start or trusts):
        return Started(None, None, layer, pool, apart)
    head, own = distributed.once(lambda: _fit(pool, apart, task, layer, rule.seed))
    if not rule.head_start:  # the trusted model begins with a head of its own all the same
        return Started(None, own, layer, pool, apart)
    chosen = own if own is not None and own.replaces else head
    undo = install(layer, chosen) if chosen.replaces else lambda: None
    return Started(chosen, own, layer, pool, apart, undo)


def _fit(
    pool: Forward | None, trusted: Forward | None, task: Task, layer: Head, seed: int
) -> tuple[HeadStart, HeadStart | None]:
    assert pool is not None
    assert pool.features is not None
    for passed in (pool, trusted):
        if passed is not None:
            require_finite(torch.from_numpy(passed.loss))
    weights = task.class_weights if isinstance(task, Classification) else None
    chosen = np.sort(stream("head start", seed).permutation(len(pool.labels))[:ROWS_TO_FIT])
    options: dict[str, Any] = {
        "kind": _kind(task),
        "width": layer.linear.out_features,
        "intercept": layer.linear.bias is not None,
        "class_weights": None if weights is None else weights.numpy(force=True),
        "rng": lambda: stream("head folds", seed),
    }
    start = fit_start(
        pool.features[chosen].astype(np.float32),
        pool.labels[chosen],
        pool.loss[chosen].astype(np.float64),
        dense_inputs=None if pool.dense is None else pool.dense[chosen].astype(np.float32),
        activation=layer.activation,
        **options,
    )
    if trusted is None or len(trusted.labels) < LEAST_TRUSTED:
        return start, None
    return start, of_trusted(start, features_with(start, trusted, layer), trusted, **options)


def _kind(task: Task) -> Kind:
    return "classes" if isinstance(task, Classification) else "numbers"
