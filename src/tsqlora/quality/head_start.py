"""The head start: before the first step, fit the head on features and install it if it is better.  METHOD 1.1."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.compat.shapes import Float, Shaped
from tsqlora.quality.agreement import Agreement, agreement
from tsqlora.quality.fallback import against_chance, require_finite
from tsqlora.quality.forward_pass import ACTIVATIONS, Forward, Head, forward_pass
from tsqlora.quality.linear_head import FOLDS, HeadFit, Kind, LinearHead, fit_head, row_losses
from tsqlora.quality.pairs import Pairs
from tsqlora.quality.passes import empty
from tsqlora.quality.ridge import ROWS_AT_ONCE, Ridge, fit_classes, fit_ridge, fit_temperature
from tsqlora.quality.rule import LookRequest
from tsqlora.quality.tag_features import TagFeatures, tag_features
from tsqlora.seeds import stream
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.multi_label import MultiLabel
from tsqlora.tasks.regression import Regression
from tsqlora.tasks.tokens import TokenClassification

ROWS_TO_FIT = 50_000
"""Fit a head on at most this many random rows: more hardly change it, and their features may not fit in memory."""
ROWS_OF_TAGS = 1_000
"""Fit a head for tags on the tokens of at most this many random rows."""
LEAST_TRUSTED = 8
"""Fit no head on fewer trusted rows."""
LEAST_P = 1e-3
"""Least probability of a label by least squares, whose predictions may lie outside of 0 and 1."""
WHITENED_STD = 0.5
"""Deviation of the outputs of a whitened dense layer: tanh is nearly linear there."""
TRAINING_SCALE = 0.5
"""Factor on a fitted head when training starts: a large head slows the features' learning (docs/method.md)."""


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

    def summary(self) -> dict[str, float | int | bool]:
        """Summarise the head start for the record and the report."""
        return {
            "replaced": self.replaces,
            "out_of_fold_loss": self.fit.loss,
            "present_loss": self.present,
            "rows": len(self.fit.rows),
            "strength": self.fit.strength,
            "scale": self.fit.scale,
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
        """Logits of every row with the head that is installed now; None for generation."""
        if self.pool is None or self.pool.logits is None:
            return None
        if self.head is None or not self.head.replaces:
            return self.pool.logits.astype(np.float32)  # large columns are in half precision
        return self.head.fit.head.logits(self._features(self.pool)).astype(np.float32)

    @torch.no_grad()
    def ready_to_train(self, task: Task) -> None:
        """Scale the installed head down, which changes no decision; heads of numbers keep their scale."""
        if self.head is None or not self.head.replaces or isinstance(task, Regression):
            return
        assert self.layer is not None
        for parameter in (self.layer.linear.weight, self.layer.linear.bias):
            if parameter is not None:
                parameter.mul_(TRAINING_SCALE)

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
        return own.fit.better_than(row_losses(constant, trusted.labels, _kind(task)))

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


def start_head(model: nn.Module, request: LookRequest) -> Started:
    """Fit the task's last linear layer on its input features, and install it if it is better.

    One forward pass without dropout over all rows and the trusted rows; the first process fits. The head is fitted on
    all rows or on the trusted rows, whichever has the lower loss on the trusted rows.
    """
    rule, task, trusted, compute = request.rule, request.task, request.trusted, request.compute
    run = partial(forward_pass, model, collate=request.collate, task=task)
    if isinstance(request.dataset, Pairs):
        few = trusted.rows.forward() if trusted is not None and isinstance(trusted.rows, Pairs) else None
        return Started(None, None, None, request.dataset.forward(), few)
    if isinstance(task, TokenClassification) and rule.head_start:
        return _start_tags(model, request, run)
    pool, layer = run(request.dataset, compute=compute, rows=request.rows)
    of_trusted = None
    if trusted is not None:
        of_trusted, _ = run(trusted.rows, compute=replace(compute, journal=None, progress=None))
    trusts = rule.trusts and trusted is not None and trusted.loss is None
    fits = isinstance(task, Answers) and len(request.dataset) >= FOLDS and (rule.head_start or trusts)
    if layer is None or not fits:
        return Started(None, None, layer, pool, of_trusted)
    head, own = distributed.once(lambda: _fit(pool, of_trusted, task, layer, rule.seed))
    if not rule.head_start:  # the trusted model still starts from its own head
        return Started(None, own, layer, pool, of_trusted)
    chosen = own if own is not None and own.replaces else head
    undo = install(layer, chosen) if chosen.replaces else lambda: None
    return Started(chosen, own, layer, pool, of_trusted, undo)


def _start_tags(
    model: nn.Module, request: LookRequest, run: Callable[..., tuple[Forward | None, Head | None]]
) -> Started:
    """Fit the head on tagged tokens before the pass over all rows, which a small table does not need."""
    layer, head, whole = _fit_tags(model, request)
    chosen = head if head is not None and head.replaces else None
    undo = install(layer, chosen) if layer is not None and chosen is not None else lambda: None
    try:
        if whole is None:
            pool, _ = run(request.dataset, compute=request.compute, rows=request.rows)
        else:
            pool = whole.forward(None if chosen is None else chosen.fit.head.logits(whole.features))
        few = None
        if request.trusted is not None:
            few, _ = run(request.trusted.rows, compute=replace(request.compute, journal=None, progress=None))
    except BaseException:
        undo()
        raise
    return Started(head, None, layer, pool, few, undo)


def _fit_tags(model: nn.Module, request: LookRequest) -> tuple[Head | None, HeadStart | None, TagFeatures | None]:
    """Fit the head on the features of tagged tokens, with folds by row; None without a last layer, or for few rows.

    Also return the tokens, if they are those of all rows.
    """
    dataset, rule = request.dataset, request.rule
    rows = np.sort(stream("head start", rule.seed).permutation(len(dataset))[:ROWS_OF_TAGS])
    result = tag_features(model, dataset, rows, request.collate, request.task, request.compute)
    if result is None:
        return None, None, None
    layer, tokens = result
    require_finite(torch.from_numpy(tokens.losses))
    whole = tokens if len(rows) == len(dataset) else None
    if len(np.unique(tokens.rows)) < FOLDS:
        return layer, None, whole
    linear = layer.linear

    def fitted() -> HeadStart:
        fit = fit_head(
            tokens.features,
            tokens.tags,
            kind="classes",
            width=linear.out_features,
            intercept=linear.bias is not None,
            groups=tokens.rows,
            rng=stream("head folds", rule.seed),
        )
        present = tokens.losses[fit.rows].astype(np.float64)
        return HeadStart(fit, float(present.mean()), fit.better_than(present))

    return layer, distributed.once(fitted), whole


def _fit(
    pool: Forward | None, trusted: Forward | None, task: Task, layer: Head, seed: int
) -> tuple[HeadStart, HeadStart | None]:
    assert pool is not None
    assert pool.features is not None
    for forward in (pool, trusted):
        if forward is not None:
            require_finite(torch.from_numpy(forward.loss))
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
    return start, fit_trusted(start, features_with(start, trusted, layer), trusted, **options)


def _kind(task: Task) -> Kind:
    if isinstance(task, MultiLabel):
        return "labels"
    return "classes" if isinstance(task, Classification) else "numbers"


def fit_start(
    features: Float[np.ndarray, "n d"],
    targets: Shaped[np.ndarray, "n *k"],
    losses: Float[np.ndarray, " n"],
    *,
    kind: Kind,
    width: int,
    intercept: bool,
    class_weights: Float[np.ndarray, " k"] | None = None,
    dense_inputs: Float[np.ndarray, "n i"] | None = None,
    activation: str = "identity",
    rng: Callable[[], np.random.Generator],
) -> HeadStart:
    """Fit the head with the least out-of-fold loss, and compare it with `losses`, those of the model's own head.

    With `dense_inputs`, the inputs of a new dense layer, a whitened layer is tried in place of the random one.
    """
    options = {"kind": kind, "width": width, "intercept": intercept, "class_weights": class_weights}
    fit, dense = fit_head(features, targets, **options, rng=rng()), None
    if dense_inputs is not None:
        whitening = whiten(dense_inputs, features.shape[1])
        outputs = torch.from_numpy(whitening.logits(dense_inputs))
        other = fit_head(ACTIVATIONS[activation](outputs).numpy(), targets, **options, rng=rng())
        if other.loss < fit.loss:
            fit, dense = other, whitening
    present = losses[fit.rows]
    return HeadStart(fit, float(present.mean()), fit.better_than(present), dense)


def fit_trusted(start: HeadStart, features: Float[np.ndarray, "m d"], trusted: Forward, **options: Any) -> HeadStart:
    """Fit a head on trusted rows alone; it replaces `start`'s if its out-of-fold losses there are lower."""
    kind: Kind = options["kind"]
    present = start.fit.head.logits(features) if start.replaces else trusted.logits
    assert present is not None
    rng = options.pop("rng")
    fit = fit_head(features, trusted.labels, **options, rng=rng())
    losses = row_losses(present.astype(np.float64), trusted.labels, kind)[fit.rows]
    dense = start.dense if start.replaces else None  # as for the features
    return HeadStart(fit, float(losses.mean()), fit.loss < float(losses.mean()), dense, trusted=True)


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


def whiten(inputs: Float[np.ndarray, "n i"], outputs: int) -> LinearHead:
    """Return a linear layer whose outputs are the leading principal components, with equal deviations."""
    mean = inputs.mean(axis=0, dtype=np.float64)
    centred = inputs.astype(np.float64) - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(inputs))
    values, vectors = values[::-1][:outputs], vectors[:, ::-1][:, :outputs]
    floor = 1e-6 * max(float(values[0]), np.finfo(np.float64).tiny)
    weight = np.zeros((outputs, inputs.shape[1]))
    weight[: len(values)] = WHITENED_STD * (vectors / np.sqrt(values.clip(floor))).T
    return LinearHead(weight, -weight @ mean)


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
