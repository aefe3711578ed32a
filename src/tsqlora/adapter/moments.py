"""Per-element optimizer state (Adam moments, momentum): read, edit, and initialise for a new slot."""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.compat.accelerate import inner_optimizer
from tsqlora.compat.bitsandbytes import is_eight_bit, optimizer_name
from tsqlora.errors import UnsupportedError

Beginning = Literal["zero", "mean", "weight"]

BEGINNINGS: Mapping[str, Beginning] = {
    "exp_avg": "zero",
    "exp_avg_sq": "mean",
    "max_exp_avg_sq": "mean",
    "exp_inf": "mean",
    "momentum_buffer": "zero",
    "square_avg": "mean",
    "grad_avg": "zero",
    "acc_delta": "mean",
    "sum": "mean",
    "ax": "weight",
    "prev": "zero",
    "step_size": "mean",
}
"""First value of a new slot in the state of torch's optimizers: zero, the mean of the active slots, or its weight."""

BITSANDBYTES: Mapping[str, Mapping[str, Beginning]] = {
    "adam": {"state1": "zero", "state2": "mean"},
    "lion": {"state1": "zero"},
    "momentum": {"state1": "zero"},
    "rmsprop": {"state1": "mean"},
    "adagrad": {"state1": "mean"},
}
"""The same for the 32-bit state of bitsandbytes, by its name of the optimizer."""

COUPLED = (
    *("LBFGS", "Muon", "LAMB", "LARS", "LARC", "StableAdamW", "NovoGrad", "AdamP", "SGDP", "Shampoo", "SOAP"),
    *("ZeroRedundancyOptimizer", "CPUOffloadOptimizer"),
)
"""Optimizers whose step is not elementwise, or whose state is elsewhere: words of their classes' names.
Many have the same state as Adam or SGD."""

_SERVED = "use AdamW, Adam or SGD"


@dataclass(frozen=True, slots=True)
class Moment:
    """A tensor of the optimizer's state with one number per number of the weight."""

    tensor: Tensor
    beginning: Beginning

    def read(self) -> Tensor:
        """The full tensor; `write` it after a change."""
        return distributed.full_tensor(self.tensor)

    def write(self, whole: Tensor) -> None:
        distributed.assign(self.tensor, whole)


def moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> dict[str, Moment]:
    """The optimizer's state per number of the parameter; empty before its first step.

    Raises UnsupportedError for an optimizer or a state that is not in the tables.
    """
    if optimizer is None:
        return {}
    inner: Any = inner_optimizer(optimizer)
    kind = type(inner)
    # In letters of any case, as a whole word: FusedLAMB has Lamb, and LambdaAdam has not.
    if any(re.search(f"(?i:{word})(?![a-z])", base.__name__) for word in COUPLED for base in kind.__mro__):
        raise UnsupportedError(
            f"the optimizer {kind.__name__} steps a whole matrix at once, or keeps its moments elsewhere, so slots "
            f"cannot come and go; {_SERVED}"
        )
    packs = optimizer_name(inner)
    beginnings = BEGINNINGS if packs is None else BITSANDBYTES.get(packs, {})
    state = inner.state.get(parameter, {})
    result: dict[str, Moment] = {}
    for name, value in state.items():
        if packs is not None and is_eight_bit(value):
            raise UnsupportedError(
                f"the optimizer {kind.__name__} keeps moments in 8 bits, in which slots cannot come and go; {_SERVED}, "
                "or bitsandbytes' in 32 bits (optim_bits=32, paged_adamw_32bit)"
            )
        if value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
            continue  # one number for the whole weight, such as a count of steps
        if name not in beginnings or not _is_plain(value) or value.shape != parameter.shape:
            form = f"shape {tuple(value.shape)}" if _is_plain(value) else f"type {type(value).__name__}"
            raise UnsupportedError(
                f"the optimizer {kind.__name__} keeps '{name}' of {form} for a weight of shape "
                f"{tuple(parameter.shape)}; tsqlora does not know how a rank change moves it: {_SERVED}"
            )
        result[name] = Moment(value, beginnings[name])
    return result


def require_moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Raises UnsupportedError, as `moments`, before the optimizer's first step: a copy of it takes one on a copy.

    State that exists does not count: a checkpoint's may belong to another run. An optimizer whose copy cannot step
    passes; `moments` refuses it after its first step.
    """
    inner: Any = inner_optimizer(optimizer)
    groups = [group for group in inner.param_groups if any(p is parameter for p in group["params"])]
    if not groups:
        return
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.ones_like(parameter)
    copied = object.__new__(type(inner))
    # Not its `step`, which a schedule has replaced by one that counts, nor its hooks.
    vars(copied).update({name: value for name, value in vars(inner).items() if name != "step"})
    copied.state, copied.param_groups = defaultdict(dict), [{**groups[0], "params": [twin]}]
    copied._optimizer_step_pre_hooks, copied._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    with suppress(Exception):
        copied.step()
    moments(twin, copied)


def cut_moments(parameter: nn.Parameter, dim: int, size: int, optimizer: torch.optim.Optimizer) -> None:
    """Cut a parameter's optimizer state to its first `size` along `dim`; drop a state that is not in the tables."""
    state = inner_optimizer(optimizer).state
    try:
        beginnings = moments(parameter, optimizer)
    except UnsupportedError:
        state.pop(parameter, None)
        return
    for name, moment in beginnings.items():
        state[parameter][name] = moment.read().narrow(dim, 0, size).clone(memory_format=torch.contiguous_format)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose entries can be moved one by one, not a packed form."""
    return type(value) in (Tensor, nn.Parameter) or distributed.is_sharded(value)
