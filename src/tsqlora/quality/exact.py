"""Checks on one batch: is the captured gradient each sample's complete gradient?"""

import inspect
from collections.abc import Mapping

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from tsqlora.compat.shapes import Float
from tsqlora.compat.torch import double
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.ghost import MeanGradient, layer_gradient, summed_gradient
from tsqlora.gradients.sites import Site
from tsqlora.quality.reference import backward, calibrated, sample_losses, total_over_sites
from tsqlora.tasks import Batch, Task
from tsqlora.tasks.forward import base_model, output_part, placed, split_labels
from tsqlora.tasks.task import require_usable


def require_own_loss(model: nn.Module, batch: Batch, task: Task) -> None:
    """Raise UnsupportedError where the model computes a loss itself and it differs from the task's.

    The batch has the first rows.  Raises DataError for a label that the loss cannot use.
    """
    inner = base_model(model)
    if "labels" not in inspect.signature(inner.forward).parameters:
        return
    inputs, labels = split_labels(batch, model)
    config = getattr(inner, "config", None)
    kind = getattr(config, "problem_type", None)
    try:
        with torch.no_grad():
            logits = task.reading.logits(model, inputs)
            require_usable(task, logits, labels, range(len(labels)))
            ours = task.batch_loss(task.loss(logits, labels), labels)
            del logits  # of text they are large
            # AdaLoRA's own model adds a penalty to the loss, which is of no sample.
            called = inner if isinstance(getattr(model, "base_model", None), AdaLoraModel) else model
            own = output_part(called(**placed(model, inputs), labels=labels), "loss")
    finally:
        # transformers stores the problem type that the first labels suggest.
        if config is not None and kind is None:
            config.problem_type = None
    if own is not None and abs(float(own) - float(ours)) > 1e-2 * max(1.0, abs(float(ours))):
        raise UnsupportedError(
            f"the model's own loss on a batch is {float(own):.4f}, but the {task.name} loss is {float(ours):.4f}; pass "
            "`task` with the loss that training uses"
        )


def require_exact(
    model: nn.Module, batch: Batch, task: Task, sites: Mapping[str, Site], offsets: Float[Tensor, " k"] | None
) -> None:
    """Raise UnsupportedError where captured gradients are not exact.

    Two passes must agree; gradients must sum to autograd's for every trainable parameter; and a sample's gradient must
    not change when it is alone in its batch.
    """
    inputs, labels = split_labels(batch, model)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    tolerance = 0.05 if half or torch.is_autocast_enabled(labels.device.type) else 0.01
    summed: dict[str, MeanGradient] = {}
    norms: list[Tensor] = []

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        parts = sites[name].parts
        summed[name] = summed_gradient(a, b, **parts)
        norms.append(layer_gradient(a, b, **parts).norm_sq())

    with torch.no_grad():
        before = calibrated(model, inputs, task, offsets)
        before = before if before.dim() == 2 else sample_losses(task, before, labels)
    modules = [(name, module) for name, site in sites.items() for module in site.modules]
    # Of each parameter that trains, once, the name of its site.
    own = {p: name for name, module in modules for p in module.parameters() if p.requires_grad}
    logits, losses, grads = backward(model, inputs, labels, task, offsets, sites, consume, tuple(own))
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
        expected, seen = square**0.5, float(summed[name].norm_sq()) ** 0.5 if name in summed else 0.0
        if abs(seen - expected) > tolerance * expected + 1e-3 * tolerance * largest:
            raise UnsupportedError(
                f"{name} is used outside of its own forward (a fused or functional call), so that its gradient per "
                "sample is not exact; freeze it"
            )
    norm = total_over_sites(norms, losses).sqrt()
    norms.clear()
    row = int(norm.argmax())
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    _, losses, _ = backward(model, alone, labels[row : row + 1], task, offsets, sites, consume)
    own_norm, alone_norm = float(norm[row]), float(total_over_sites(norms, losses).sqrt())
    if abs(own_norm - alone_norm) > tolerance * own_norm:
        raise UnsupportedError(
            f"one sample's gradient norm is {own_norm:.4g} in a batch of {len(labels)}, but {alone_norm:.4g} alone: "
            "the model or the loss couples the samples of a batch; remove batch statistics"
        )
