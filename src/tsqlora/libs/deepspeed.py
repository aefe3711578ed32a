"""Parameters that deepspeed.zero.Init has partitioned; deepspeed itself is imported only where it made them."""

import importlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds the parameter in parts; elsewhere it is empty."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Generator[bool]:
    """Whole parameters to write to while open; yields whether this process writes."""
    parts = list(parameters)
    if not any(map(is_partitioned, parts)):
        yield True
        return
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0
