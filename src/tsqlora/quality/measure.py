"""What the passes over one batch say of its samples: norms, dot products, losses, stepped losses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tsqlora.gradients.ghost import LayerGradient, layer_gradient
from tsqlora.gradients.lookahead import stepped
from tsqlora.gradients.sites import Site
from tsqlora.quality.reference import Reference, backward, sample_losses, total_over_sites
from tsqlora.quality.terms import Measured
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, model_logits


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
) -> Measured:
    """What one batch's passes say: forward; with a reference's gradient backward; for `lookahead` forward again."""
    if not reference.mean:
        with torch.no_grad():
            logits = model_logits(model, inputs) + reference.offsets
        return Measured(logits=logits, labels=labels, loss=sample_losses(task, logits, labels))
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
            stepped_loss = task.loss(model_logits(model, inputs) + reference.offsets, labels)
    return Measured(
        logits=logits,
        labels=labels,
        loss=losses,
        norm_sq=norm_sq,
        dot=_leave_one_out(total_over_sites(dots, losses), norm_sq, reference.rows, in_reference),
        reference_norm=reference.norm,
        stepped_loss=stepped_loss,
    )


def _leave_one_out(dot: Tensor, norm_sq: Tensor, rows: int, in_reference: Tensor) -> Tensor:
    """⟨g, ḡ⟩, with ḡ free of the sample itself where it is one of the reference's rows."""
    without_itself = (dot - norm_sq / rows) * (rows / (rows - 1))
    return torch.where(in_reference, without_itself, dot)
