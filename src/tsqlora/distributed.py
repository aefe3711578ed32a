"""Communication between processes.  With one process every function is the identity."""

import os
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tsqlora.errors import TsqLoraError, UnsupportedError
from tsqlora.libs.accelerate import is_compiled
from tsqlora.libs.deepspeed import is_partitioned
from tsqlora.libs.torch import inside_compiled

T = TypeVar("T")

_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "timeout", "NCCL error")
"""Words of a collective's error after a peer has died or does not answer."""


def active() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(values: Tensor) -> Tensor:
    """The sum over processes, the same on each."""
    if active():
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_process(here: bool, device: torch.device) -> bool:
    """Whether it is true in any process; one process does not wait for its device."""
    return bool(summed(torch.tensor(float(here), device=device)) > 0) if active() else here


def from_first(value: T) -> T:
    """The first process's value, in every process."""
    if active():
        box = [value if is_first() else None]
        dist.broadcast_object_list(box, src=0)
        value = value if is_first() else cast(T, box[0])
    return value


def gathered(value: T) -> list[T]:
    """Every process's value, in their order."""
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def to_first(value: T) -> list[T]:
    """Every process's value, in their order, in the first one, and nothing in the others."""
    if not active():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(value, values)
    return values or []


def together(work: Callable[[], T]) -> T:
    """The result of `work`; an error in one process is raised in all, so that none waits for it."""
    value: T | None = None
    error: Exception | None = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    failures = gathered(_portable(error))
    if error is not None:
        raise error
    for process, failure in enumerate(failures):
        if failure is not None:
            raise failure if isinstance(failure, TsqLoraError) else TsqLoraError(f"process {process}: {failure}")
    return cast(T, value)


def once(work: Callable[[], T]) -> T:
    """The first process's result of `work`, in all processes; its error too."""
    return from_first(together(lambda: work() if is_first() else cast(T, None)))


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every n-th of the items."""
    return items[dist.get_rank() :: dist.get_world_size()] if active() else items


def require_same(what: str, value: Any) -> None:
    """Raises TsqLoraError in every process if their values do not print alike."""
    checksums = gathered(zlib.crc32(repr(value).encode()))
    if len(set(checksums)) > 1:
        raise TsqLoraError(
            f"the {len(checksums)} processes have different {what}; give all of them the same model, settings and seed"
        )


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that FSDP2 has sharded; any other tensor itself, not a copy."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def assign(tensor: Tensor, value: Tensor) -> None:
    """Assign a full tensor to one that may be sharded: each process keeps its part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded = cast(Any, tensor)
        # No source: every process has the same whole.
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    if value is not tensor:
        tensor.copy_(value)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a tensor in parts over processes, as FSDP2 makes of a model's weights."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # half a second, that one process does not need

    return isinstance(tensor, DTensor)


@contextmanager
def explain_lost_peer(advice: str) -> Generator[None]:
    """Turn a collective's cryptic error after a peer died into a TsqLoraError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TsqLoraError) or not active() or not any(words in str(error) for words in _LOST):
            raise
        raise TsqLoraError(
            f"another of the {dist.get_world_size()} processes has ended or does not answer (see its message), so "
            f"this one ends too; {advice}"
        ) from error


def wait() -> None:
    """Wait for every process."""
    if active():
        dist.barrier()


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not active() or dist.get_rank() == 0


def launched() -> int:
    """Number of processes that the program was started as, connected or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding(arguments: Mapping[str, Any]) -> str | None:
    """The engine that shards the model, by the launcher or these fields of TrainingArguments; None without one."""
    engines = ("FSDP", "DeepSpeed")
    on = (os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true") for name in engines)
    configured = (bool(arguments.get(name.lower())) for name in engines)
    return next((name for name, *ways in zip(engines, on, configured, strict=True) if any(ways)), None)


def warn_of_one_process() -> None:
    """Warn where accelerate's launcher on CPU has started one process, although it takes their number."""
    names = os.environ
    if "MASTER_ADDR" in names and "WORLD_SIZE" not in names and names.get("ACCELERATE_USE_CPU", "").lower() == "true":
        warnings.warn(
            "accelerate launch --cpu started one process, whatever --num_processes says; for several on CPU type: "
            "torchrun --nproc_per_node 2 -m tsqlora.cli train CONFIG",
            stacklevel=3,
        )


def refuse_deepspeed(plugin: Any) -> None:
    """Raises UnsupportedError where ranks would move in a training with a plugin of DeepSpeed."""
    if plugin is not None:
        raise UnsupportedError(
            "DeepSpeed keeps gradients and moments where ranks that move cannot reach them; set ranks.policy: fixed "
            "(leave RankCallback out), or use accelerate launch without DeepSpeed (DDP or FSDP2)"
        )


LOOK_FIRST = (
    "take the look first: tsqlora look CONFIG --out LOOK, and train with --look LOOK; in Python "
    "tsqlora.look(model, dataset, collate, out='LOOK'), and QualityCallback(data, look='LOOK')"
)


def refuse_sharded_loading(model: nn.Module) -> None:
    """Raises UnsupportedError for a model that transformers has sharded while loading it."""
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise UnsupportedError(
            "distributed_config has sharded the model while loading it, so no head can be written, and transformers "
            "cannot resume; load it without distributed_config, and let accelerate shard it: "
            f"accelerate launch --use_fsdp --fsdp_version 2; {LOOK_FIRST}"
        )


def parts_of(parameter: Any) -> str | None:
    """How a parameter is not whole in this process; None if it is."""
    if is_partitioned(parameter):
        return "partitioned by DeepSpeed ZeRO-3 (it has a ds_id)"
    if is_sharded(parameter):
        return "sharded by FSDP2 (a DTensor)"
    return "without data (on the meta device)" if parameter.is_meta else None


def require_whole(model: nn.Module, plugin: Any = None) -> None:
    """Raises UnsupportedError naming a parameter that no look can read or write here, or the plugin of DeepSpeed."""
    refuse_sharded_loading(model)
    if plugin is not None:
        raise UnsupportedError(
            f"DeepSpeed has its own copy of the weights, so a head that is fitted now is lost; {LOOK_FIRST}"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedError(f"FSDP1 has flattened the weights; use --fsdp_version 2, and {LOOK_FIRST}")
    for name, parameter in model.named_parameters():
        if (parts := parts_of(parameter)) is not None:
            raise UnsupportedError(f"{name} is {parts}, so no look can be taken; {LOOK_FIRST}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, torch.compile, and DistributedDataParallel, which awaits the other processes."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif is_compiled(model):
            model = inside_compiled(model)
        elif type(model).__name__ == "DeepSpeedEngine":
            refuse_deepspeed(model)
        else:
            return model


def _portable(error: Exception | None) -> TsqLoraError | str | None:
    """An error for the other processes: ours unchanged, others as text, since they may not pickle."""
    return error if error is None or isinstance(error, TsqLoraError) else f"{type(error).__name__}: {error}"
