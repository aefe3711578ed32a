"""What training's loss is to the samples' own losses: one factor, seen where both meet, at the logits."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tsqlora.errors import UnsupportedError
from tsqlora.quality.reference import sample_losses
from tsqlora.tasks import Task


def source_of(logits: Tensor) -> tuple[Any, int]:
    """The node of the graph that made the logits, and which of its outputs they are.

    Not that of a cast behind them (accelerate casts what a model returns): the loss may have been
    taken from what was cast.
    """
    node, place = logits.grad_fn, logits.output_nr
    while node is not None and node.name() == "ToCopyBackward0":
        node, place = node.next_functions[0]
    if node is None:
        raise UnsupportedError("the model's logits do not depend on anything that trains")
    return node, place


def by_logits(task: Task, logits: Float[Tensor, "n k"], labels: Tensor) -> Float[Tensor, "n k"]:
    """The gradient of the sum of the samples' losses."""
    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(sample_losses(task, leaf, labels).sum(), leaf)[0]


def scale_of(grad: Float[Tensor, "n k"], own: Float[Tensor, "n k"], name: str) -> float:
    """The c for which grad = c · own; 1 where own vanishes as well.

    Raises UnsupportedError where there is none: then training's loss is not the task's.
    """
    tolerance = 1e-2 if grad.dtype in (torch.float16, torch.bfloat16) else 1e-4
    grad, own = grad.double().cpu(), own.double().cpu()
    square = float(own.square().sum())
    scale = float((grad * own).sum()) / square if square else 0.0
    off, size = float((grad - scale * own).norm()), float(grad.norm())
    if size == 0:
        return 0.0 if square else 1.0
    if scale <= 0 or off > tolerance * size:
        raise UnsupportedError(
            f"the gradient that training sends to the logits is {off / size:.1%} off any multiple of the samples' own "
            f"{name} losses' gradient; pass `task` with the loss that training uses"
        )
    return scale
