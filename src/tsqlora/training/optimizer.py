"""An optimizer in training: it must train the slots; hooks around its steps; the norm of its gradients."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.adapter.slots import Slots
from tsqlora.compat.accelerate import inner_optimizer
from tsqlora.errors import SettingsError, UnsupportedError


def require_trained(layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer) -> None:
    """Refuse layers whose adapter is frozen or not among the optimizer's parameters."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for slots in layers.values():
        if not all(parameter.requires_grad for parameter, _ in slots.matrices()):
            raise UnsupportedError(
                f"the adapter of {slots.name} is frozen, so its rank cannot move; unfreeze it, or leave the layer "
                "out of target_modules"
            )
        if any(id(parameter) not in trained for parameter, _ in slots.matrices()):
            raise SettingsError(
                f"the optimizer does not train the adapter of {slots.name}: the model was wrapped later, or parameters "
                "were chosen by the ends of names, which with slots are parametrizations.weight.original; make the "
                "optimizer from the parameters of the model that tsqlora.wrap gives"
            )


def call_around_steps(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> AbstractContextManager[Any]:
    """Context manager: call before() and after() around each optimizer.step(). Holds weak references.

    An optimizer that wraps another calls them twice within a step.
    """
    inner, hooks = inner_optimizer(optimizer), ExitStack()
    try:
        hooks.enter_context(inner.register_step_pre_hook(_as_hook(before)))
        hooks.enter_context(inner.register_step_post_hook(_as_hook(after)))
    except AttributeError:
        raise UnsupportedError(
            f"the optimizer {type(inner).__name__} never called Optimizer.__init__, so its steps cannot be followed; "
            "give the optimizer that it wraps"
        ) from None
    return hooks


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """The norm of all gradients, on the device: finite if every number is; None without gradients."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return distributed.full_tensor(torch.nn.utils.get_total_norm(grads)) if grads else None


def finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every number of the gradients is finite; true without gradients."""
    norm = gradient_norm(parameters)
    return norm is None or bool(norm.isfinite())


def _as_hook(method: Callable[[], None]) -> Callable[..., None]:
    reference = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (there := reference()) is not None:
            there()

    return hook
