"""The reference: the mean gradient that samples are compared with, and what else it settles.

Two passes over some rows. Without gradients: the calibration, and whether the model has
learned. With them: ḡ, its norm, and the step size η of the look-ahead.  METHOD section 1.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsqlora.errors import UnsupportedError
from tsqlora.gradients.capture import Consume, capture
from tsqlora.gradients.ghost import MeanGradient, layer_gradient, summed_gradient
from tsqlora.gradients.sites import Site, inner_name
from tsqlora.quality.learned import LearnedTest, learned
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, model_logits, split_labels


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants added to the logits while scoring, and the test that the model has learned."""

    offsets: Tensor
    learned: LearnedTest
    first_logits: Tensor
    """Of the first batch: what a second forward must give again."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The mean gradient ḡ of some rows."""

    mean: Mapping[str, MeanGradient]
    norm: float
    eta: float
    rows: int


def calibrate(model: nn.Module, batches: Iterable[Batch], task: Task, *, enabled: bool) -> Calibration:
    """One pass without gradients: offsets (zeros unless `enabled`) and the learned test."""
    device = next(model.parameters()).device
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            inputs, y = split_labels(batch, device)
            logits.append(model_logits(model, inputs))
            labels.append(y)
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    constant = task.chance(all_labels, all_logits.shape[1]).to(all_logits)
    test = learned(
        task.loss(all_logits, all_labels), task.loss(constant.expand_as(all_logits).contiguous(), all_labels)
    )
    offsets = task.offsets(all_logits, all_labels) if enabled else torch.zeros_like(constant)
    return Calibration(offsets.to(all_logits), test, logits[0])


def backward(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    sites: Mapping[str, Site],
    consume: Consume,
    also: tuple[nn.Parameter, ...] = (),
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Logits and losses of a batch, and `consume(site, a, b)` for every site that was used.

    `also`: parameters whose gradient of the summed loss is returned as well; nothing is
    accumulated anywhere.
    """
    with torch.enable_grad(), capture(model, sites, consume) as tap:
        logits = model_logits(model, inputs)
        losses = loss(logits, labels)
        # Summed, not averaged: a sample's gradient must not depend on its batch.
        grads = torch.autograd.grad(losses.sum(), [tap.anchor, *also], allow_unused=True)
    return logits.detach(), losses.detach(), list(grads[1:])


def measure_reference(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    sites: Mapping[str, Site],
    calibration: Calibration,
) -> Reference:
    """One pass with gradients: ḡ, ‖ḡ‖ and η = ½ Σℓ / ΣN².

    On the first batch it checks that what was captured is the whole gradient; raises
    UnsupportedError naming the parameter that is used in a way that was not seen.
    """
    device = next(model.parameters()).device
    total: dict[str, MeanGradient] = {}
    loss = norm_sq = 0.0
    rows = 0
    for batch in batches:
        inputs, labels = split_labels(batch, device)
        batch_sum, losses, batch_norm_sq = _reference_batch(
            model, inputs, labels, task, sites, calibration, check=rows == 0
        )
        for name, gradient in batch_sum.items():
            total[name] = total[name].plus(gradient) if name in total else gradient
        loss += float(losses.double().sum())
        norm_sq += float(batch_norm_sq.double().sum())
        rows += len(labels)
    mean = {name: gradient.scaled(1 / rows) for name, gradient in total.items()}
    norm = float(torch.stack([m.norm_sq().double() for m in mean.values()]).sum().sqrt())
    if not (norm > 0 and norm_sq > 0):
        raise UnsupportedError("every gradient of the reference is zero; there is nothing to score by")
    return Reference(mean, norm, 0.5 * loss / norm_sq, rows)


def _reference_batch(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    task: Task,
    sites: Mapping[str, Site],
    calibration: Calibration,
    *,
    check: bool,
) -> tuple[dict[str, MeanGradient], Tensor, Tensor]:
    summed: dict[str, MeanGradient] = {}
    norms: list[Tensor] = []

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        parts = {"weight": sites[name].weight, "bias": sites[name].bias}
        summed[name] = summed_gradient(a, b, **parts)
        norms.append(layer_gradient(a, b, **parts).norm_sq())

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return task.loss(logits + calibration.offsets, y)

    own = _parameters(model, sites) if check else {}
    logits, losses, grads = backward(model, inputs, labels, loss, sites, consume, tuple(own.values()))
    if check:
        _require_deterministic(logits, calibration.first_logits)
        _require_complete(dict(zip(own, grads, strict=True)), sites, summed)
    return summed, losses, torch.stack(norms).sum(0)


def _parameters(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, nn.Parameter]:
    """θ as autograd knows it: the trainable parameters of the sites' modules, by site."""
    names: dict[int, str] = {}
    for site in sites.values():
        for module in site.modules if isinstance(site.modules[0], nn.Linear) else ():
            names |= {id(p): site.name for p in module.parameters() if p.requires_grad}
    return {inner_name(n): p for n, p in model.named_parameters() if id(p) in names}


def _require_deterministic(logits: Tensor, before: Tensor) -> None:
    error = float((logits - before).abs().max()) / max(float(before.abs().max()), 1e-12)
    if error > 1e-2:
        raise UnsupportedError(
            f"two forward passes of one batch differ by {error:.1%}: the model is random also with dropout off"
        )


def _require_complete(
    by_autograd: Mapping[str, Tensor | None], sites: Mapping[str, Site], captured: Mapping[str, MeanGradient]
) -> None:
    """Compares the summed gradient with autograd's own, site by site."""
    seen = {name: float(g.norm_sq()) for name, g in captured.items()}
    truth: dict[str, float] = {}
    for parameter, grad in by_autograd.items():
        owner = max((s for s in sites if parameter.startswith(f"{s}.")), key=len)
        truth[owner] = truth.get(owner, 0.0) + (0.0 if grad is None else float(grad.double().square().sum()))
    scale = max(truth.values(), default=0.0)
    for name, expected in truth.items():
        if abs(seen.get(name, 0.0) - expected) > 0.05 * expected + 1e-6 * scale:
            raise UnsupportedError(
                f"{name} is used in a way that its own forward does not show (a fused or functional call): its "
                "gradient per sample cannot be had exactly; freeze it"
            )
