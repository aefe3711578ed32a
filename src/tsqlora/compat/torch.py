"""What tsqlora needs of torch that is private or differs between versions."""

import copy
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_view(tensor: Tensor) -> bool:
    """Whether autograd takes the tensor for a view of another, which a custom function must not mark as dirty."""
    return tensor._is_view()


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy that shares everything but its weight; its `forward` runs none of the module's hooks."""
    twin = cast(Any, copy.copy(module))
    twin._parameters = {**twin._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def inside_compiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    return cast(nn.Module, module._orig_mod)


def compile_limits(times: int) -> AbstractContextManager[Any]:
    """torch.compile so many times as often as it may by default: beyond its limit it gives up in silence."""
    import torch._dynamo.config as dynamo  # seconds to import

    config: Any = dynamo
    names = ("recompile_limit", "accumulated_recompile_limit")
    return config.patch({name: getattr(config, name) * times for name in names})


def remove_state_dict_hooks(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Removes these functions from a module's state dict hooks, also from a copy's, to which no handle leads."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        registered = cast(MutableMapping[int, Any], hooks)
        # torch wraps those that are given the module.
        for key in [key for key, hook in registered.items() if getattr(hook, "hook", hook) in functions]:
            del registered[key]


def show_directly(kind: type[nn.Module], tensor: str) -> None:
    """Makes a parametrised tensor as fast to read as it can be: one parametrisation, without two calls of modules.

    Those take longer than the product with a small matrix, three times in each forward pass of a layer. `kind` is the
    class that torch made for one module and its copies.
    """

    def shown(holder: Any) -> Tensor:
        parts = holder._modules["parametrizations"]._modules[tensor]
        if len(parts._modules) > 1:
            return parts()  # somebody's own parametrisation of what is shown
        return parts._modules["0"].forward(parts._parameters["original"])

    setattr(kind, tensor, property(shown, kind.__dict__[tensor].fset))


NO_FLOAT64 = {"mps"}
"""Kinds of devices that cannot compute in float64."""


def double(x: Tensor) -> Tensor:
    """In float64: on the tensor's own device, or on the processor where the device has none, as Apple's MPS."""
    return (x.cpu() if x.device.type in NO_FLOAT64 else x).double()


def upcast(x: Tensor) -> Tensor:
    """Half precision raised to float32, everything else as it is: sums must not round."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
