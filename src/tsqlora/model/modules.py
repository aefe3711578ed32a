"""Modules of a model: their names, which are linear, and which couple the samples of a batch."""

import re
from typing import Any, TypeGuard

from torch import nn
from transformers.pytorch_utils import Conv1D

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def inner_name(name: str) -> str:
    """Return a module's name in the base model, as PEFT's patterns and targets use it."""
    # rpartition, since the PeftModel may itself be part of another module.
    return name.rpartition("base_model.model.")[2]


def plain_name(name: str) -> str:
    """Return a parameter's name in the base model, also of a module that PEFT trains a copy of.

    >>> plain_name("base_model.model.classifier.modules_to_save.default.weight")
    'classifier.weight'
    """
    return re.sub(r"\.modules_to_save\.[^.]+", "", inner_name(name))


def batch_coupled(model: nn.Module) -> list[str]:
    """Name the parts of the model that make a sample's loss depend on the rest of its batch."""
    names = [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if isinstance(m, BATCH_NORMS)]
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        names.append("the auxiliary loss of a mixture of experts (config.output_router_logits)")
    return names


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether the layer computes y = x Wᵀ + b; a subclass with another forward does not count."""
    if type(module).__qualname__ == "FalconLinear":  # of transformers: the same in another order of operations
        return True
    kinds: tuple[Any, ...] = (nn.Linear, Conv1D)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
