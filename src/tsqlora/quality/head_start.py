"""The head start: a fitted head in place of a random one, before the first step.  METHOD 1.1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tsqlora.quality.features import ACTIVATIONS, Head
from tsqlora.quality.forward_pass import Forward, empty
from tsqlora.quality.linear_head import HeadFit, Kind, fit_head, row_losses
from tsqlora.quality.ridge import ROWS_AT_ONCE

WHITENED_STD = 0.5
"""Of what a whitened dense layer gives: within the range in which tanh is nearly linear."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Weights of the layer before the last one."""

    weight: Float[np.ndarray, "d i"]
    bias: Float[np.ndarray, " d"]


@dataclass(frozen=True, slots=True, eq=False)
class HeadStart:
    """The fitted head, and the layer before it where whitening lost less."""

    fit: HeadFit
    present: float
    """Mean loss, on the same rows, of the head that was there."""
    replaces: bool
    """Whether the fitted head's out-of-fold loss lies below that by 2 standard errors."""
    dense: Dense | None = None
    trusted: bool = False
    """Whether it was fitted on trusted rows."""

    def summary(self) -> dict[str, float | int | bool]:
        """For the scores' record and the report."""
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
    """The head that loses least out of fold, compared with `losses`, those of the head that is there.

    With `dense_inputs`, what a new dense layer is given, a whitened one is tried in place of the random one.
    """
    options = {"kind": kind, "width": width, "intercept": intercept, "class_weights": class_weights}
    fit, dense = fit_head(features, targets, **options, rng=rng()), None
    if dense_inputs is not None:
        whitening = whiten(dense_inputs, features.shape[1])
        outputs = torch.from_numpy(dense_inputs @ whitening.weight.T + whitening.bias)
        other = fit_head(ACTIVATIONS[activation](outputs).numpy(), targets, **options, rng=rng())
        if other.loss < fit.loss:
            fit, dense = other, whitening
    present = losses[fit.rows]
    return HeadStart(fit, float(present.mean()), fit.better_than(present), dense)


def of_trusted(start: HeadStart, features: Float[np.ndarray, "m d"], trusted: Forward, **options: Any) -> HeadStart:
    """The head fitted on trusted rows alone, in place of `start`'s where its losses on them, out of fold, are lower."""
    kind: Kind = options["kind"]
    there = start.fit.head.logits(features) if start.replaces else trusted.logits
    assert there is not None
    rng = options.pop("rng")
    fit = fit_head(features, trusted.labels, **options, rng=rng())
    losses = row_losses(there.astype(np.float64), trusted.labels, kind)[fit.rows]
    dense = start.dense if start.replaces else None  # as for the features
    return HeadStart(fit, float(losses.mean()), fit.loss < float(losses.mean()), dense, trusted=True)


def features_with(start: HeadStart, of: Forward, layer: Head) -> Float[np.ndarray, "n d"]:
    """What the last linear layer is given once the start is installed."""
    assert of.features is not None
    if start.dense is None or of.dense is None or not start.replaces:
        return of.features
    found = empty(of.features.shape, np.dtype(np.float32))
    for first in range(0, len(found), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        outputs = of.dense[rows].astype(np.float64) @ start.dense.weight.T + start.dense.bias
        found[rows] = ACTIVATIONS[layer.activation](torch.from_numpy(outputs)).numpy()
    return found


def whiten(inputs: Float[np.ndarray, "n i"], outputs: int) -> Dense:
    """A linear layer whose outputs are the inputs' leading principal components, uncorrelated and of one spread."""
    mean = inputs.mean(axis=0, dtype=np.float64)
    centred = inputs.astype(np.float64) - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(inputs))
    values, vectors = values[::-1][:outputs], vectors[:, ::-1][:, :outputs]
    floor = 1e-6 * max(float(values[0]), np.finfo(np.float64).tiny)
    weight = np.zeros((outputs, inputs.shape[1]))
    weight[: len(values)] = WHITENED_STD * (vectors / np.sqrt(values.clip(floor))).T
    return Dense(weight, -weight @ mean)


@torch.no_grad()
def install(head: Head, start: HeadStart) -> Callable[[], None]:
    """Write the fitted weights into the layers, in place; what is returned puts the former ones back."""
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
