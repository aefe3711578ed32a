"""Checks on one batch: is the captured gradient each sample's complete gradient?"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tsqlora.errors import UnsupportedError
from tsqlora.libs.shapes import Float
from tsqlora.libs.torch import double
from tsqlora.model.forward import sample_losses
from tsqlora.paper.ghost import norm_sq
from tsqlora.paper.reference import calibrated, measured
from tsqlora.paper.sites import Site, find_sites
from tsqlora.tasks import Batch, Task
from tsqlora.tasks.forward import split_labels


def require_exact(
    model: nn.Module,
    batch: Batch,
    task: Task,
    sites: Mapping[str, Site] | None = None,
    offsets: Float[Tensor, " k"] | None = None,
) -> None:
    """Raise UnsupportedError where captured gradients are not exact.

    Two passes must agree; gradients must sum to autograd's for every trainable parameter; and a sample's gradient must
    not change when it is alone in its batch.
    """
    sites = find_sites(model) if sites is None else sites
    inputs, labels = split_labels(batch, model)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    tolerance = 0.05 if half or torch.is_autocast_enabled(labels.device.type) else 0.01
    with torch.no_grad():
        before = calibrated(model, inputs, task, offsets)
        before = before if before.dim() == 2 else sample_losses(task, before, labels)
    modules = [(name, module) for name, site in sites.items() for module in site.modules]
    # Of each parameter that trains, once, the name of its site.
    own = {p: name for name, module in modules for p in module.parameters() if p.requires_grad}
    summed, squares, (logits, losses, grads) = measured(model, inputs, labels, task, offsets, sites, tuple(own))
    error, scale = float(((losses if logits is None else logits) - before).abs().max()), float(before.abs().max())
    if error > tolerance * scale:
        raise UnsupportedError(
            f"two forward passes of one batch differ by {error / (scale or 1):.1%}: the model is random even without "
            "dropout; turn off its other randomness"
        )
    truth = dict.fromkeys(own.values(), 0.0)
    for name, grad in zip(own.values(), grads, strict=True):
        truth[name] += 0.0 if grad is None else float(double(grad).square().sum())
    largest = max(truth.values(), default=0.0) ** 0.5
    for name, square in truth.items():
        expected, seen = square**0.5, float(norm_sq(summed[name])) ** 0.5 if name in summed else 0.0
        if abs(seen - expected) > tolerance * expected + 1e-3 * tolerance * largest:
            raise UnsupportedError(
                f"{name} is used outside of its own forward (a fused or functional call), so that its gradient per "
                "sample is not exact; freeze it"
            )
    row = int(squares.argmax())
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    _, square, _ = measured(model, alone, labels[row : row + 1], task, offsets, sites)
    own_norm, alone_norm = float(squares[row].sqrt()), float(square.sqrt())
    if abs(own_norm - alone_norm) > tolerance * own_norm:
        raise UnsupportedError(
            f"one sample's gradient norm is {own_norm:.4g} in a batch of {len(labels)}, but {alone_norm:.4g} alone: "
            "the model or the loss couples the samples of a batch; remove batch statistics"
        )
