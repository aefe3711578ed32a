"""The head start: before the first step, fit the head on features and install it if it is better."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.compat.shapes import Float, Shaped
from tsqlora.quality.fallback import require_finite
from tsqlora.quality.forward_pass import ACTIVATIONS, Forward, Head, forward_pass
from tsqlora.quality.linear_head import FOLDS, Kind, LinearHead, fit_head, row_losses
from tsqlora.quality.pairs import Pairs
from tsqlora.quality.rule import LookRequest, needs_probe
from tsqlora.quality.started import LEAST_TRUSTED, TRAINING_SCALE, HeadStart, Started, features_with, head_kind, install
from tsqlora.quality.tag_features import TagFeatures, tag_features
from tsqlora.seeds import stream
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.tokens import TokenClassification

ROWS_TO_FIT = 50_000
"""Fit a head on at most this many random rows: more hardly change it, and their features may not fit in memory."""
ROWS_OF_TAGS = 1_000
"""Fit a head for tags on the tokens of at most this many random rows."""
WHITENED_STD = 0.5
"""Deviation of the outputs of a whitened dense layer: tanh is nearly linear there."""


def start_head(model: nn.Module, request: LookRequest) -> Started:
    """Fit the task's last linear layer on its input features, and install it if it is better.

    One forward pass without dropout over all rows and the trusted rows; the first process fits. The head is fitted on
    all rows or on the trusted rows, whichever has the lower loss on the trusted rows.
    """
    rule, task, trusted, compute = request.rule, request.task, request.trusted, request.compute
    run = partial(forward_pass, model, collate=request.collate, task=task, mean=needs_probe(rule.measured()))
    if isinstance(request.dataset, Pairs):
        few = trusted.rows.forward() if trusted is not None and isinstance(trusted.rows, Pairs) else None
        return Started(None, None, None, request.dataset.forward(), few)
    if isinstance(task, TokenClassification) and rule.head_start:
        return _start_tags(model, request, run)
    pool, layer = run(request.dataset, compute=compute, rows=request.rows)
    of_trusted = None
    if trusted is not None:
        of_trusted, _ = run(trusted.rows, compute=replace(compute, journal=None, progress=None), kind="trusted row")
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
        return HeadStart(fit, float(present.mean()), fit.better_than(present), training_scale=TRAINING_SCALE)

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
        "kind": head_kind(task),
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
    scale = TRAINING_SCALE if intercept or kind != "numbers" else 1.0
    return HeadStart(fit, float(present.mean()), fit.better_than(present), dense, training_scale=scale)


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
