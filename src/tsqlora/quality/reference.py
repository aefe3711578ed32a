"""The reference: the mean gradient that samples are compared with, and what else it settles.

Two passes over some rows. Without gradients: the calibration. With them: ḡ, its norm, and the step size η of the
look-ahead.  METHOD section 1.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsqlora.compat.torch import double
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.capture import Consume, capture
from tsqlora.gradients.ghost import MeanGradient, layer_gradient, summed_gradient
from tsqlora.gradients.sites import Site
from tsqlora.tasks import Task, require_answers
from tsqlora.tasks.forward import Batch, model_logits, split_labels
from tsqlora.tasks.generation import Generation

SHORT = 128
"""Tokens up to which plain attention is not slower than the fused one."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The mean gradient ḡ of some rows, and what their passes settled for all others."""

    mean: Mapping[str, MeanGradient]
    """Of each site; empty where no gradient is asked for, and then norm and eta are 0."""
    norm: float
    eta: float
    rows: int
    offsets: Float[Tensor, " k"] | None

    def to(self, device: torch.device) -> "Reference":
        """The same on another device."""
        mean = {name: gradient.to(device) for name, gradient in self.mean.items()}
        return replace(self, mean=mean, offsets=None if self.offsets is None else self.offsets.to(device))


def calibrate(model: nn.Module, batches: Iterable[Batch], task: Task, *, enabled: bool) -> Float[Tensor, " k"] | None:
    """Constants to add to the logits while scoring, by a pass without gradients; None where nothing leans.

    Text has no classes to lean to.
    """
    if not enabled or isinstance(task, Generation):
        return None
    answers = require_answers(task, "calibration")
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            inputs, y = split_labels(batch, model)
            parts.append((model_logits(model, inputs, task), y))
    logits, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return answers.offsets(logits, labels).to(logits)


def measure_reference(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    sites: Mapping[str, Site],
    offsets: Float[Tensor, " k"] | None,
) -> Reference:
    """One pass with gradients: ḡ, ‖ḡ‖ and η = ½ Σℓ / ΣN².

    Raises UnsupportedError where all gradients vanish.
    """
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
        raise UnsupportedError("every gradient of the reference is zero; there is nothing to score by")
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
    """Calibrated logits and losses of a batch, and `consume(site, a, b)` for every site that was used.

    Of generated text the logits are None: their gradient has taken their place.

    `also`: parameters whose gradient of the summed loss is returned as well; nothing is
    accumulated anywhere.
    """
    with torch.enable_grad(), capture(model, sites, consume) as tap, _attention(inputs):
        logits = calibrated(model, inputs, task, offsets)
        losses = sample_losses(task, logits, labels)
        # Summed, not averaged: a sample's gradient must not depend on its batch. The anchor
        # is added so that there is a graph also where no site reaches the loss.
        grads = torch.autograd.grad(losses.sum() + tap.anchor, [tap.anchor, *also], allow_unused=True)
    return logits.detach() if logits.dim() == 2 else None, losses.detach(), list(grads[1:])


def calibrated(model: nn.Module, inputs: Batch, task: Task, offsets: Float[Tensor, " k"] | None) -> Tensor:
    """The model's logits, leaning to no class."""
    logits = model_logits(model, inputs, task)
    return logits if offsets is None else logits + offsets


def _attention(inputs: Batch) -> AbstractContextManager[Any]:
    """Plain attention where torch's fused one is slow: its backward pass in bfloat16 on a CPU, for short samples.

    Measured with torch 2.13 for 32 samples of MiniLM's heads: at 32 tokens 35 ms against 9, at 128 even, at 512 half.
    """
    first = next(iter(inputs.values()))
    on_cpu = first.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    short = first.dim() == 2 and first.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if on_cpu and short else nullcontext()


def sample_losses(task: Task, logits: Float[Tensor, "n *k"], labels: Tensor) -> Float[Tensor, " n"]:
    """The task's loss of each sample.  Raises UnsupportedError where that is not one number a sample."""
    losses = task.loss(logits, labels)
    if losses.shape != (len(logits),):
        raise UnsupportedError(
            f"the loss of {len(logits)} samples has shape {tuple(losses.shape)}; it must give one number a sample"
        )
    return losses


def total_over_sites(parts: list[Tensor], losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The sites' numbers added up sample by sample, where the losses are; zeros if there are none."""
    return torch.stack([torch.zeros_like(losses), *(part.to(losses) for part in parts)]).sum(0)
