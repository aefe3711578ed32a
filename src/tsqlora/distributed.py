"""The only file that knows of processes.  With one process every function is the identity."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tsqlora.errors import TsqLoraError

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


def each(work: Callable[[], T]) -> list[T]:
    """What `work` gives in every process, in their order.  An error in one of them is raised in all."""
    if not active():
        return [work()]
    mine, error = None, None
    try:
        mine = work()
    except Exception as raised:
        error = raised
    # Errors of ours as they are; others need not survive the way.
    told = error if error is None or isinstance(error, TsqLoraError) else f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (mine, told))
    if error is not None:
        raise error
    for process, (_, failure) in enumerate(outcomes):
        if isinstance(failure, TsqLoraError):
            raise failure
        if failure is not None:
            raise TsqLoraError(f"process {process} failed: {failure}")
    return [value for value, _ in outcomes]


def once(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all; an error too."""
    return each(lambda: work() if is_first() else cast(T, None))[0]


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, of n processes; each item is in one process."""
    return items[dist.get_rank() :: dist.get_world_size()] if active() else items


def require_same(what: str, value: Any) -> None:
    """Raises TsqLoraError in every process if their values do not print alike."""
    checksum = zlib.crc32(repr(value).encode())
    checksums = each(lambda: checksum)
    if len(set(checksums)) > 1:
        raise TsqLoraError(
            f"the {len(checksums)} processes have different {what}; give all of them the same model, settings and seed"
        )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which FSDP2 gave each process a part; any other tensor itself, not a copy."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def assign(tensor: Tensor, value: Tensor) -> None:
    """Makes what `whole` gave, and was changed since, the tensor's value: each process keeps its part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        kept = cast(Any, tensor)
        # No source: every process has the same whole.
        value = distribute_tensor(value, kept.device_mesh, kept.placements, src_data_rank=None)
    if value is not tensor:
        tensor.copy_(value)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a tensor in parts over processes, as FSDP2 makes of a model's weights."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # half a second, that one process does not need

    return isinstance(tensor, DTensor)


def wait() -> None:
    """Until every process has come here."""
    if active():
        dist.barrier()


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not active() or dist.get_rank() == 0
