"""The reference: the mean gradient ḡ that samples are compared with, calibration, and step size.

A pass over some rows without gradients gives the calibration; one with gradients gives ḡ, its norm, and the step size η
of the look-ahead.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsqlora.compat.shapes import Float
from tsqlora.compat.torch import double
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.capture import Consume, capture
from tsqlora.gradients.ghost import MeanGradient, layer_gradient, summed_gradient
from tsqlora.gradients.sites import Site
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Batch, model_logits, split_labels

SHORT = 128
"""Tokens up to which plain attention is not slower than fused attention."""


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
        mean = {name: gradient.to(device) for name, gradient in self.mean.items()}
        return replace(self, mean=mean, offsets=None if self.offsets is None else self.offsets.to(device))


def calibrate(model: nn.Module, batches: Iterable[Batch], task: Task, *, enabled: bool) -> Float[Tensor, " k"] | None:
    """Return constants to add to the logits while scoring, from a pass without gradients; None for text and tags."""
    if not enabled or not isinstance(task, Answers):
        return None
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            inputs, y = split_labels(batch, model)
            parts.append((model_logits(model, inputs, task), y))
    logits, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return task.offsets(logits, labels).to(logits)


def measure_reference(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    sites: Mapping[str, Site],
    offsets: Float[Tensor, " k"] | None,
) -> Reference:
    """Measure ḡ, ‖ḡ‖ and η = ½ Σℓ / ΣN² in one pass.  Raises UnsupportedError if all gradients are zero."""
    total: dict[str, MeanGradient] = {}
    norms: list[Tensor] = []

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        parts = sites[name].parts
        summed = summed_gradient(a, b, **parts)
        total[name] = total[name].plus(summed) if name in total else summed
        norms.append(layer_gradient(a, b, **parts).norm_sq())

    loss = norm_sq = 0.0
    rows = 0
    for batch in batches:
        inputs, labels = split_labels(batch, model)
        norms.clear()
        _, losses, _ = backward(model, inputs, labels, task, offsets, sites, consume)
        loss += float(double(losses).sum())
        norm_sq += float(double(total_over_sites(norms, losses)).sum())
        rows += len(labels)
    mean = {name: gradient.scaled(1 / rows) for name, gradient in total.items()}
    norm = sum(float(m.norm_sq()) for m in mean.values()) ** 0.5
    if not (norm > 0 and norm_sq > 0):
        raise UnsupportedError("every gradient of the reference is zero; use a loss that depends on the weights")
    return Reference(mean, norm, 0.5 * loss / norm_sq, rows, offsets)


def backward(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    task: Task,
    offsets: Float[Tensor, " k"] | None,
    sites: Mapping[str, Site],
    consume: Consume,
    also: tuple[nn.Parameter, ...] = (),
) -> tuple[Float[Tensor, "n k"] | None, Float[Tensor, " n"], list[Tensor | None]]:
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
    logits = model_logits(model, inputs, task)
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


def sample_losses(task: Task, logits: Float[Tensor, "n *k"], labels: Tensor) -> Float[Tensor, " n"]:
    """Return the task's loss per sample; raise UnsupportedError if that is not one number per sample."""
    losses = task.loss(logits, labels)
    if losses.shape != (len(logits),):
        raise UnsupportedError(
            f"the loss of {len(logits)} samples has shape {tuple(losses.shape)}; return one number per sample"
        )
    return losses


def total_over_sites(parts: list[Tensor], losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sum the sites' values per sample, on the device of the losses."""
    return torch.stack([torch.zeros_like(losses), *(part.to(losses) for part in parts)]).sum(0)
