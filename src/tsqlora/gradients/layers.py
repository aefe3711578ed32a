"""Supported layers, and the part of the weight gradient that one call of each provides.

Three kinds. Linear (nn.Linear, and transformers' Conv1D, whose weight is transposed): inputs a. Gain (LayerNorm,
RMSNorm, any layer that is affine in a vector with one weight per feature): the normalised input. Lookup (Embedding):
the indices.
"""

import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsqlora.compat.torch import with_weight
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.ghost import Gain, Kind, Linear, Lookup

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def kind_of(module: nn.Module) -> Kind | None:
    """Return how the gradient of a layer's weight and bias follows from one call; None for an unsupported layer."""
    if is_linear(module):
        return Linear()
    if is_embedding(module):
        return Lookup(module.num_embeddings)
    return Gain() if _is_affine(module) else None


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether the layer computes y = x Wᵀ + b; a subclass with another forward does not count."""
    kinds: tuple[Any, ...] = (nn.Linear, Conv1D)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether the layer only looks up rows: max_norm changes them, scale_grad_by_freq couples samples."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def input_of(module: nn.Module, kind: Kind, x: Tensor, samples: int, name: str) -> Tensor:
    """Return the input that a gradient of this kind needs from a call on x: n × t × i, or indices n × t.

    Raises UnsupportedError for inputs whose first dimension is not the batch.
    """
    if is_embedding(module):
        return by_sample(x.unsqueeze(-1), samples, name).squeeze(-1)
    return by_sample(_without_gain(module, x, name) if isinstance(kind, Gain) else x, samples, name)


def output_gradient_of(module: nn.Module, x: Tensor, grad: Tensor, samples: int, name: str) -> Tensor:
    """Return the gradient as n × t × o; zero for an Embedding's padding index, whose row does not train."""
    b = by_sample(grad, samples, name)
    if is_embedding(module) and module.padding_idx is not None:
        b = b.masked_fill((x == module.padding_idx).reshape(*b.shape[:2], 1), 0)
    return b


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first argument of a call, positional or by keyword."""
    return next(iter((*args, *kwargs.values())))


def by_sample(x: Tensor, samples: int, name: str) -> Tensor:
    """Reshape x to n × t × features: all dimensions between the first and the last are tokens."""
    if x.dim() < 2 or x.shape[0] != samples:
        raise UnsupportedError(
            f"{name} is called on a tensor of shape {tuple(x.shape)} in a batch of {samples}, which mixes samples; "
            "give the layer inputs whose first dimension is the batch"
        )
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _is_affine(module: nn.Module) -> bool:
    """Whether the layer may be affine in a vector of weights; scoring measures whether it is (quality/exact.py)."""
    if isinstance(module, BATCH_NORMS) or list(module.children()):
        return False
    own = dict(module.named_parameters(recurse=False))
    if own.keys() - {"weight", "bias"} or any(p.dim() != 1 for p in own.values()):
        return False
    return "weight" in own and len(inspect.signature(module.forward).parameters) == 1


def _without_gain(module: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return ∂y/∂weight of a layer that is affine in its weight: its output at weight 1 minus that at 0."""
    weight: Tensor = module.get_parameter("weight")
    if x.shape[-1] != len(weight):
        raise UnsupportedError(
            f"{name} ({type(module).__name__}) has {len(weight)} weights for an input of shape {tuple(x.shape)}, "
            "not one per feature, so that its gradient per sample is not exact; freeze it"
        )
    with torch.no_grad():
        ones, zeros = (
            with_weight(module, fill(weight)).forward(x.to(weight)) for fill in (torch.ones_like, torch.zeros_like)
        )
    return ones - zeros
