"""Interfaces of torch that are private or differ between versions."""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_view(tensor: Tensor) -> bool:
    """Whether autograd treats the tensor as a view, which a custom function must not mark as dirty."""
    return tensor._is_view()


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a tensor's data: itself, or those inside a subclass such as torchao's Int8Tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(tensor, name))


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy that shares everything but the weight; its `forward` runs no hooks."""
    twin = cast(Any, copy.copy(module))
    twin._parameters = {**twin._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def inside_compiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's."""
    return cast(nn.Module, module._orig_mod)


def compile_limits(times: int) -> AbstractContextManager[Any]:
    """Multiply torch.compile's limits, beyond which it falls back silently."""
    import torch._dynamo.config as dynamo  # seconds to import

    config: Any = dynamo
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    names = (name, f"accumulated_{name}")
    return config.patch({name: getattr(config, name) * times for name in names})


def remove_state_dict_hooks(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Remove functions from a module's state dict hooks, also in a copy, for which there is no handle."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        registered = cast(MutableMapping[int, Any], hooks)
        # torch wraps hooks that take the module.
        for key in [key for key, hook in registered.items() if getattr(hook, "hook", hook) in functions]:
            del registered[key]


def show_directly(kind: type[nn.Module], tensor: str) -> None:
    """Speed up reading a parametrised tensor: skip two module calls if there is one parametrisation.

    These calls take longer than the product with a small matrix, three times in each forward pass of a layer. `kind`
    is the class that torch made for one module and its copies.
    """

    def shown(holder: Any) -> Tensor:
        parts = holder._modules["parametrizations"]._modules[tensor]
        if len(parts._modules) > 1:
            return parts()  # another parametrisation on top
        return parts._modules["0"].forward(parts._parameters["original"])

    setattr(kind, tensor, property(shown, kind.__dict__[tensor].fset))


NO_FLOAT64 = {"mps"}
"""Device types without float64."""


def double(x: Tensor) -> Tensor:
    """In float64, on the CPU if the device lacks it, as Apple's MPS does."""
    return (x.cpu() if x.device.type in NO_FLOAT64 else x).double()


def upcast(x: Tensor) -> Tensor:
    """Half precision as float32, other types unchanged: sums must not round."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
