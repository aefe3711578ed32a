"""What the passes over one batch say of its samples: norms, dot products, losses, stepped losses."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tsqlora.errors import SettingsError
from tsqlora.gradients.ghost import LayerGradient, layer_gradient
from tsqlora.gradients.lookahead import stepped
from tsqlora.gradients.sites import Site
from tsqlora.quality.predictions import predictions
from tsqlora.quality.reference import Reference, backward, calibrated, sample_losses, total_over_sites
from tsqlora.quality.terms import Measured, Term
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, model_logits, split_labels
from tsqlora.tasks.generation import IGNORED, Generation, without_prompt


def measure(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    *,
    task: Task,
    sites: Mapping[str, Site],
    reference: Reference,
    in_reference: Tensor,
    lookahead: bool,
    alone: bool = False,
) -> Measured:
    """What one batch's passes say: forward; with a reference's gradient backward; for `lookahead` forward again.

    `alone` costs a forward pass of the targets without their prompts.
    """
    alone_loss = _alone(model, inputs, labels, task) if alone else None
    if not reference.mean:
        with torch.no_grad():
            logits = calibrated(model, inputs, task, reference.offsets)
            losses = sample_losses(task, logits, labels)
        answers = logits if logits.dim() == 2 else None
        return Measured(logits=answers, labels=labels, loss=losses, alone_loss=alone_loss)
    gradients: dict[str, LayerGradient] = {}
    norms: list[Tensor] = []
    dots: list[Tensor] = []

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        gradient = layer_gradient(a, b, **sites[name].parts)
        norms.append(gradient.norm_sq())
        if name in reference.mean:
            dots.append(gradient.dot(reference.mean[name]))
        if lookahead:
            gradients[name] = gradient

    logits, losses, _ = backward(model, inputs, labels, task, reference.offsets, sites, consume)
    norm_sq = total_over_sites(norms, losses)
    stepped_loss = None
    if lookahead:
        with torch.no_grad(), stepped(sites, gradients, eta=reference.eta, samples=len(labels)):
            stepped_loss = task.loss(calibrated(model, inputs, task, reference.offsets), labels)
    return Measured(
        logits=logits,
        labels=labels,
        loss=losses,
        norm_sq=norm_sq,
        dot=_leave_one_out(total_over_sites(dots, losses), norm_sq, reference.rows, in_reference),
        reference_norm=reference.norm,
        stepped_loss=stepped_loss,
        alone_loss=alone_loss,
    )


def measured_columns(
    model: nn.Module,
    batch: Batch,
    task: Task,
    sites: Mapping[str, Site],
    reference: Reference,
    in_reference: Bool[Tensor, " n"],
    terms: Mapping[str, Term],
) -> dict[str, np.ndarray]:
    """Each term, prediction and label of one batch's rows."""
    device = next(model.parameters()).device
    inputs, labels = split_labels(batch, model)
    measured = measure(
        model,
        inputs,
        labels,
        task=task,
        sites=sites,
        reference=reference,
        in_reference=in_reference.to(device),
        lookahead=any(term.lookahead for term in terms.values()),
        alone=any(term.alone for term in terms.values()),
    )
    label = task.targets(labels).ne(IGNORED).sum(1) if isinstance(task, Generation) else labels
    values = {n: term.of(measured) for n, term in terms.items()} | predictions(measured, task) | {"label": label}
    for name, value in values.items():
        if value.shape[: 1 if name == "logits" else None] != (len(labels),):
            raise SettingsError(f"quality term '{name}' gives {tuple(value.shape)} for {len(labels)} samples")
    return {name: value.cpu().numpy() for name, value in values.items()}


@torch.no_grad()
def _alone(model: nn.Module, inputs: Batch, labels: Tensor, task: Task) -> Tensor:
    assert isinstance(task, Generation)
    targets, own = without_prompt(inputs["input_ids"], labels)
    return task.loss(model_logits(model, targets, task), own)


def _leave_one_out(dot: Tensor, norm_sq: Tensor, rows: int, in_reference: Tensor) -> Tensor:
    """⟨g, ḡ⟩, with ḡ free of the sample itself where it is one of the reference's rows."""
    without_itself = (dot - norm_sq / rows) * (rows / (rows - 1))
    return torch.where(in_reference, without_itself, dot)
