"""The head start: before the first step, fit the head on features and install it if it is better.

The learned test compares the losses of the better head with those of a constant guess: gradients of a model at chance
carry no information.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.auditing.labels.question import held_out
from tsqlora.errors import TsqLoraError
from tsqlora.libs.shapes import Bool, Float, Int, Shaped
from tsqlora.libs.torch import double
from tsqlora.model.forward import ACTIVATIONS, Forward, Head, WithReference, forward_pass
from tsqlora.model.linear import FOLDS, HeadFit, LinearHead, fit_head, row_losses
from tsqlora.model.passes import Columns, empty, run_pass
from tsqlora.model.request import Compute, LookRequest, needs_probe
from tsqlora.model.ridge import ROWS_AT_ONCE, fit_temperature
from tsqlora.model.units import Units, token_units
from tsqlora.sampling import rows_to_fit
from tsqlora.seeds import stream
from tsqlora.tasks import Answers, Batch, Collate, Task, answers_of
from tsqlora.tasks.forward import split_labels
from tsqlora.tasks.task import Link, require_labels

MARGIN = 2.0
"""Standard errors by which the model's mean loss must beat a constant guess."""
ROWS_TO_FIT = 10_000
"""Fit a head on about this many rows: more hardly change it, and their features may not fit in memory."""
ROWS_OF_TAGS = 1_000
"""Fit a head for tags on the tokens of at most this many random rows."""
SCALE = 0.25
"""Factor on the fit of least out-of-fold loss when it is installed (docs/method.md), which changes no class, label, tag
or order of numbers: a head of large norm slows the learning of the features (Tomihari and Sato 2024). A head of numbers
without a bias keeps its scale, since it could not keep their mean."""
WHITENED_STD = 0.5
"""Deviation of the outputs of a whitened dense layer: tanh is nearly linear there."""


def why_at_chance(losses: Float[Tensor, " n"], chance: Float[Tensor, " n"]) -> str | None:
    """Explain why a model's losses are not evidently below those of a constant guess, `chance`; None if they are.

    A one-sided paired test: the mean of chance − loss must be MARGIN standard errors above 0. n is at least 2. Raises
    TsqLoraError for losses that are not finite.
    """
    difference = double(chance - losses)
    require_finite(difference)
    mean, rows = float(difference.mean()), len(difference)
    # Not below rounding: identical rows would be infinitely many errors away.
    error = max(float(difference.std()) / math.sqrt(rows), 1e-9 * abs(mean))
    errors = mean / error if error else 0.0
    if errors > MARGIN:
        return None
    if float(chance.mean()) < 1e-9:
        return f"all {rows} rows have the same label, so that a constant guess is perfect"
    return (
        f"the model's loss on {rows} rows is {float(losses.mean()):.4f}, a constant guess's is "
        f"{float(chance.mean()):.4f}: {errors:.1f} standard errors below, and more than {MARGIN:g} are needed"
    )


def require_finite(losses: Float[Tensor, " n"]) -> None:
    """Raise TsqLoraError where a loss is not finite."""
    if bad := int((~losses.isfinite()).sum()):
        raise TsqLoraError(
            f"{bad} of {len(losses)} losses are not finite; lower training.learning_rate or use another dtype"
        )


def against_chance(answers: Answers, logits: Float[Tensor, "n k"], labels: Shaped[Tensor, "n *k"]) -> str | None:
    """Compare a model's losses with those of the best constant guess on the same rows, as `why_at_chance`."""
    constant = answers.chance(labels, logits.shape[1]).to(logits.dtype).to(logits.device).expand_as(logits).contiguous()
    return why_at_chance(answers.loss(logits, labels), answers.loss(constant, labels))


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

    def measure(_: np.ndarray, batch: Batch) -> Columns:
        inputs, labels = split_labels(batch, model)
        require_labels(task, labels)
        logits = task.reading.logits(model, inputs)
        return {} if answers is None else {"logits": logits.numpy(force=True), "labels": labels.numpy(force=True)}

    answers, rows = answers_of(task), list(rows)
    some = rows[:batch_size] if answers is None else rows
    with torch.no_grad():
        columns = run_pass(model, measure, some, collate, Compute(batch_size, autocast))
    if answers is None:
        return True
    logits, labels = torch.from_numpy(columns["logits"]), torch.from_numpy(columns["labels"])
    return len(labels) > 1 and against_chance(answers, logits, labels) is None


@dataclass(frozen=True, slots=True, eq=False)
class HeadStart:
    """The fitted head, and a whitened layer before it if that has the lower loss."""

    fit: HeadFit
    present: float
    """Mean loss of the model's own head on the same rows."""
    replaces: bool
    """Whether the fitted head's out-of-fold loss is lower by 2 standard errors."""
    dense: LinearHead | None = None
    scale: float = SCALE

    @property
    def installed(self) -> LinearHead:
        """The head as training begins with it: scaled around the mean of numbers, or around 0."""
        head, scale = self.fit.head, self.scale
        return LinearHead(head.weight * scale, head.bias * scale + (1 - scale) * self.fit.middle)

    def summary(self) -> dict[str, float | int | bool]:
        """Summarise the head start for the record and the report."""
        return {
            "replaced": self.replaces,
            "out_of_fold_loss": self.fit.loss,
            "present_loss": self.present,
            "rows": len(self.fit.losses),
            "strength": self.fit.strength,
            "scale": self.scale,
            "whitened": self.dense is not None,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """A model with its head start, and the forward passes before it."""

    head: HeadStart | None
    """None if the model has no head to fit."""
    layer: Head | None
    pool: Forward
    trusted: Forward | None
    held: Bool[np.ndarray, " n"]
    """Rows of the pool that are held out of every fit."""
    undo: Callable[[], None] = lambda: None
    """Restores the model's own head."""

    @property
    def logits(self) -> Float[np.ndarray, "n k"] | None:
        """Logits of every row of the pool with the head that training begins with; None for generation.

        In the first process, which has the features.
        """
        if self.pool.logits is None:
            return None
        if self.head is None or self.layer is None or not self.head.replaces:
            return self.pool.logits.astype(np.float32)  # large columns are in half precision
        return self.head.installed.logits(features_with(self.head, self.pool, self.layer)).astype(np.float32)

    def why_not(self, task: Task) -> str | None:
        """Explain why the model is at chance; None if its losses beat a constant guess.

        Those of a fitted head are out of fold.
        """
        pool, head, answers = self.pool, self.head, answers_of(task)
        if pool.logits is None or answers is None or len(pool.labels) < 2:
            return None
        labels, logits = torch.from_numpy(pool.labels), self.logits
        assert logits is not None
        if head is not None and head.replaces:
            constant = np.tile(answers.chance(labels, logits.shape[1]).numpy(), (len(head.fit.losses), 1))
            chance = row_losses(constant.astype(np.float64), head.fit.targets, answers.link)
            return why_at_chance(*(torch.from_numpy(head.fit.weights * losses) for losses in (head.fit.losses, chance)))
        why = against_chance(answers, torch.from_numpy(logits), labels)
        if why is not None and answers.link == "softmax":
            # An overconfident model, or one trained on correct labels among wrong ones, is not at chance.
            logits = (logits / fit_temperature(logits, pool.labels)).astype(np.float32)
            why = against_chance(answers, torch.from_numpy(logits), labels)
        return why if self.layer or not why else f"{why}; no linear head of it trains (give LoraConfig a task_type)"


def start_head(model: nn.Module, request: LookRequest, *, mean: bool = False) -> Started:
    """Fit the task's last linear layer on its input features, and install it if it is better than the model's own.

    One forward pass without dropout over all rows and the trusted rows, with their mean hidden states on request; the
    first process fits. Trusted rows, rows that equal one, and rows that are held out are in no fit.
    """
    rule, task, trusted, compute = request.rule, request.task, request.trusted, request.compute
    mean = mean or needs_probe(rule.measured())
    run = partial(forward_pass, model, collate=request.collate, task=task, mean=mean)
    every = partial(run, request.dataset, compute=compute, rows=request.rows)
    if isinstance(request.dataset, WithReference):
        return Started(None, None, request.dataset.forward(), None, np.zeros(len(request.dataset), np.bool_))
    if rule.head_start and task.reading.units(of_rows=False, of_tokens=True):
        # Tokens of some rows fit the head before the pass over all rows, which a small table does not need.
        held = distributed.once(partial(held_out, request, None))
        layer, units, head = _of_tokens(model, replace(request, excluded=request.twins | held))
        undo = install(layer, head)
        try:
            if units is None or units.count != len(request.dataset):
                pool = every()[0]
            else:
                fitted = head.installed if head is not None and head.replaces else None
                pool = units.forward(None if fitted is None else fitted.logits(units.features))
        except BaseException:
            undo()
            raise
        return Started(head, layer, pool, None, held, undo)
    (pool, layer), few, head = every(), None, None
    if trusted is not None:
        few, _ = run(trusted, compute=replace(compute, parts=None, progress=None), kind="trusted row")
    held = distributed.once(partial(held_out, request, task.reading.strata(pool.labels)))
    answers, own = answers_of(task), ~(request.twins | held)
    if layer is not None and answers is not None and own.sum() >= FOLDS and rule.head_start:
        head = distributed.once(partial(_fit, pool, answers, layer, rule.seed, own))
    return Started(head, layer, pool, few, held, install(layer, head))


def _of_tokens(model: nn.Module, request: LookRequest) -> tuple[Head | None, Units | None, HeadStart | None]:
    """Fit the head on tagged tokens, with folds by row; None without a last layer, or for few rows."""
    dataset, rule = request.dataset, request.rule
    rows = np.sort(stream("head start", rule.seed).permutation(len(dataset))[:ROWS_OF_TAGS])
    result = token_units(model, dataset, rows, request.collate, task=request.task, compute=request.compute)
    if result is None:
        return None, None, None
    layer, units = result
    own = np.flatnonzero(~request.twins[rows[units.rows]])
    assert units.losses is not None
    require_finite(torch.from_numpy(units.losses))
    if len(np.unique(units.rows[own])) < FOLDS:
        return layer, units, None
    some, weights = rows_to_fit(units.labels[own], ROWS_TO_FIT)
    chosen = own[some]
    fit = partial(
        fit_start,
        units.features[chosen],
        units.labels[chosen],
        units.losses[chosen].astype(np.float64),
        link="softmax",
        width=units.width,
        intercept=layer.linear.bias is not None,
        weights=weights,
        groups=units.rows[chosen],
        rng=lambda: stream("head folds", rule.seed),
    )
    return layer, units, distributed.once(fit)


def _fit(pool: Forward, answers: Answers, layer: Head, seed: int, own: Bool[np.ndarray, " n"]) -> HeadStart:
    assert pool.features is not None
    assert pool.logits is not None
    require_finite(torch.from_numpy(pool.loss))
    class_weights, rows = answers.class_weights, np.flatnonzero(own)
    classes = pool.labels[rows] if answers.link == "softmax" else np.zeros(len(rows), np.int64)
    some, weights = rows_to_fit(classes, ROWS_TO_FIT)
    chosen = rows[some]
    return fit_start(
        pool.features[chosen].astype(np.float32),
        pool.labels[chosen],
        # Plain, as the fit's: training's own loss may be smoothed or weighted.
        row_losses(pool.logits[chosen].astype(np.float64), pool.labels[chosen], answers.link),
        dense_inputs=None if pool.dense is None else pool.dense[chosen].astype(np.float32),
        activation=layer.activation,
        weights=weights,
        link=answers.link,
        width=layer.linear.out_features,
        intercept=layer.linear.bias is not None,
        class_weights=None if class_weights is None else class_weights.numpy(force=True),
        rng=lambda: stream("head folds", seed),
    )


def fit_start(
    features: Float[np.ndarray, "n d"],
    targets: Shaped[np.ndarray, "n *k"],
    losses: Float[np.ndarray, " n"],
    *,
    link: Link,
    width: int,
    intercept: bool,
    class_weights: Float[np.ndarray, " k"] | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
    groups: Int[np.ndarray, " n"] | None = None,
    dense_inputs: Float[np.ndarray, "n i"] | None = None,
    activation: str = "identity",
    rng: Callable[[], np.random.Generator],
) -> HeadStart:
    """Fit the head with the least out-of-fold loss, and compare it with `losses`, those of the model's own head.

    With `dense_inputs`, the inputs of a new dense layer, a whitened layer is tried in place of the random one.
    """
    whitening = outputs = None
    if dense_inputs is not None:
        whitening = whiten(dense_inputs, features.shape[1])
        outputs = ACTIVATIONS[activation](torch.from_numpy(whitening.logits(dense_inputs))).numpy()
    options = {"link": link, "width": width, "intercept": intercept, "class_weights": class_weights}
    fit = fit_head(features, targets, **options, weights=weights, groups=groups, other=outputs, rng=rng())
    present, dense = float(np.average(losses, weights=fit.weights)), whitening if fit.of_other else None
    scale = SCALE if intercept or link != "identity" else 1.0
    return HeadStart(fit, present, fit.better_than(losses), dense, scale)


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


def fitted_parameters(head: Head | None, start: HeadStart | None) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters of the head's layers, each with its fitted value; none where the model's own head stays."""
    if head is None or start is None or not start.replaces:
        return []
    return [
        (parameter, torch.from_numpy(value))
        for layer, fitted in ((head.linear, start.installed), (head.dense, start.dense))
        if layer is not None and fitted is not None
        for parameter, value in ((layer.weight, fitted.weight), (layer.bias, fitted.bias))
        if parameter is not None
    ]


def install(head: Head | None, start: HeadStart | None) -> Callable[[], None]:
    """Write the fitted weights into the layers in place; return a function that restores the former ones."""
    fitted = fitted_parameters(head, start)
    before = [(parameter, parameter.detach().clone()) for parameter, _ in fitted]
    _write(fitted)
    return partial(_write, before)


@torch.no_grad()
def _write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)


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
