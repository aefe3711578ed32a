"""What the passes over one batch say of its samples: norms, dot products, losses, stepped losses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tsqlora.gradients.ghost import LayerGradient, layer_gradient
from tsqlora.gradients.lookahead import stepped
from tsqlora.gradients.sites import Site
from tsqlora.quality.reference import Reference, backward, calibrated, sample_losses, total_over_sites
from tsqlora.quality.terms import Measured
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, model_logits
from tsqlora.tasks.generation import Generation, without_prompt


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


@torch.no_grad()
def _alone(model: nn.Module, inputs: Batch, labels: Tensor, task: Task) -> Tensor:
    assert isinstance(task, Generation)
    targets, own = without_prompt(inputs["input_ids"], labels)
    return task.loss(model_logits(model, targets, task), own)


def _leave_one_out(dot: Tensor, norm_sq: Tensor, rows: int, in_reference: Tensor) -> Tensor:
    """⟨g, ḡ⟩, with ḡ free of the sample itself where it is one of the reference's rows."""
    without_itself = (dot - norm_sq / rows) * (rows / (rows - 1))
    return torch.where(in_reference, without_itself, dot)
