"""The only file that knows of processes.  With one process every function is the identity."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def active() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(values: Tensor) -> Tensor:
    """The sum over processes, the same on each."""
    if active():
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_first(value: T) -> T:
    """The first process's value, on every process: what is decided is decided once."""
    if not active():
        return value
    box = [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not active() or dist.get_rank() == 0
