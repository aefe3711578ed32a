"""Interfaces of accelerate that are private or differ between versions."""

from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.memory import clear_device_cache
from accelerate.utils.memory import should_reduce_batch_size as says_out_of_memory
from accelerate.utils.other import is_compiled_module as is_compiled

__all__ = ["clear_device_cache", "is_compiled", "says_out_of_memory"]


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def loss_scale(optimizer: torch.optim.Optimizer) -> float | None:
    """The current scale of accelerate's gradient scaler; None without one."""
    scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
    return None if scaler is None else scaler.get_scale()


def row_sampler(loader: Any) -> Any:
    """The sampler of a loader's rows, whose batches accelerate distributes among processes."""
    batches = loader.batch_sampler
    while isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", batches)
