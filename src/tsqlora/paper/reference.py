"""The reference: the mean gradient ḡ that samples are compared with, calibration, and step size.

A pass over some rows without gradients gives the calibration; one with gradients gives ḡ, its norm, and the step size η
of the look-ahead.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsqlora.errors import UnsupportedError
from tsqlora.libs.shapes import Float
from tsqlora.libs.torch import double
from tsqlora.model.forward import sample_losses
from tsqlora.model.passes import Columns, run_pass
from tsqlora.model.request import Compute
from tsqlora.paper.capture import Consume, capture
from tsqlora.paper.ghost import MeanGradient, layer_gradient, norm_sq, summed_gradient
from tsqlora.paper.sites import Site
from tsqlora.tasks import Batch, Collate, Task, answers_of
from tsqlora.tasks.forward import split_labels

SHORT = 128
"""Tokens up to which plain attention is not slower than fused attention."""


Backward = tuple[Float[Tensor, "n k"] | None, Float[Tensor, " n"], list[Tensor | None]]
"""Calibrated logits, losses, and further gradients of a batch."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The mean gradient ḡ of some rows, with calibration and step size for all rows."""

    mean: Mapping[str, MeanGradient]
    """By site; empty if no term needs gradients, and then norm and eta are 0."""
    norm: float
    eta: float
    rows: int
    offsets: Float[Tensor, " k"] | None

    def to(self, device: torch.device) -> "Reference":
        """Move to a device."""
        mean = {name: [part.to(device) for part in gradient] for name, gradient in self.mean.items()}
        return replace(self, mean=mean, offsets=None if self.offsets is None else self.offsets.to(device))


def calibrate(
    model: nn.Module, rows: Sequence[Any], collate: Collate, task: Task, compute: Compute
) -> Float[Tensor, " k"] | None:
    """Return constants to add to the logits while scoring, from a pass without gradients; None for text and tags."""
    answers = answers_of(task)
    if answers is None:
        return None

    def measure(_: np.ndarray, batch: Batch) -> Columns:
        inputs, labels = split_labels(batch, model)
        return {"logits": task.reading.logits(model, inputs).numpy(force=True), "labels": labels.numpy(force=True)}

    with torch.no_grad():
        columns = run_pass(model, measure, rows, collate, compute)
    logits, labels = torch.from_numpy(columns["logits"]), torch.from_numpy(columns["labels"])
    return answers.offsets(logits, labels).to(logits).to(next(model.parameters()).device)


def measure_reference(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    task: Task,
    sites: Mapping[str, Site],
    offsets: Float[Tensor, " k"] | None,
    compute: Compute,
) -> Reference:
    """Measure ḡ, ‖ḡ‖ and η = ½ Σℓ / ΣN² in one pass.  Raises UnsupportedError if all gradients are zero."""
    total: dict[str, MeanGradient] = {}

    def measure(_: np.ndarray, batch: Batch) -> Columns:
        inputs, labels = split_labels(batch, model)
        sums, squares, result = measured(model, inputs, labels, task, offsets, sites)
        for name, parts in sums.items():
            total[name] = [a + b for a, b in zip(total[name], parts, strict=True)] if name in total else parts
        return {"loss": double(result[1]).numpy(force=True), "norm_sq": double(squares).numpy(force=True)}

    columns = run_pass(model, measure, rows, collate, compute)
    mean = {name: [part * (1 / len(rows)) for part in gradient] for name, gradient in total.items()}
    norm, squares = sum(float(norm_sq(m)) for m in mean.values()) ** 0.5, float(columns["norm_sq"].sum())
    if not (norm > 0 and squares > 0):
        raise UnsupportedError("every gradient of the reference is zero; use a loss that depends on the weights")
    return Reference(mean, norm, 0.5 * float(columns["loss"].sum()) / squares, len(rows), offsets)


def measured(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    task: Task,
    offsets: Float[Tensor, " k"] | None,
    sites: Mapping[str, Site],
    also: tuple[nn.Parameter, ...] = (),
) -> tuple[dict[str, MeanGradient], Float[Tensor, " n"], Backward]:
    """Return the summed gradient of each used site, each sample's squared norm, and what `backward` returns."""
    sums, norms = dict[str, MeanGradient](), list[Tensor]()

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        sums[name] = summed_gradient(a, b, **sites[name].parts)
        norms.append(layer_gradient(a, b, **sites[name].parts).norm_sq())

    result = backward(model, inputs, labels, task, offsets, sites, consume, also)
    return sums, total_over_sites(norms, result[1]), result


def backward(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    task: Task,
    offsets: Float[Tensor, " k"] | None,
    sites: Mapping[str, Site],
    consume: Consume,
    also: tuple[nn.Parameter, ...] = (),
) -> Backward:
    """Return calibrated logits and losses of a batch, and call `consume(site, a, b)` for every used site.

    The logits are None for generation, where their gradient has overwritten them. Gradients of the summed loss in the
    parameters `also` are returned too; no gradient accumulates anywhere.
    """

    def by_sample(name: str, a: Tensor, b: Tensor) -> None:
        # The two answers of a preference pair are neighbouring rows of the batch.
        consume(name, *(x.unflatten(0, (len(labels), -1)).flatten(1, 2) for x in (a, b)))

    with torch.enable_grad(), capture(model, sites, by_sample) as tap, _attention(inputs):
        logits = calibrated(model, inputs, task, offsets)
        losses = sample_losses(task, logits, labels)
        # Summed, not averaged: a sample's gradient must not depend on its batch. Adding the anchor gives a graph even
        # where no site reaches the loss.
        grads = torch.autograd.grad(losses.sum() + tap.anchor, [tap.anchor, *also], allow_unused=True)
    return logits.detach() if logits.dim() == 2 else None, losses.detach(), list(grads[1:])


def calibrated(model: nn.Module, inputs: Batch, task: Task, offsets: Float[Tensor, " k"] | None) -> Tensor:
    """Return the model's logits plus the calibration."""
    logits = task.reading.logits(model, inputs)
    return logits if offsets is None else logits + offsets


def _attention(inputs: Batch) -> AbstractContextManager[Any]:
    """Use plain attention for short samples in bfloat16 on a CPU, where torch's fused backward pass is slow.

    Measured with torch 2.13 on 32 samples with MiniLM's heads: fused 35 ms against plain 9 ms at 32 tokens, equal at
    128, twice as fast at 512.
    """
    first = next(iter(inputs.values()))
    on_cpu = first.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    short = first.dim() == 2 and first.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if on_cpu and short else nullcontext()


def total_over_sites(parts: list[Tensor], losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sum the sites' values per sample, on the device of the losses."""
    return torch.stack([torch.zeros_like(losses), *(part.to(losses) for part in parts)]).sum(0)
