"""What is asked of the optimizer: that it trains the slots, tells of its steps, and has finite gradients."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from tsqlora import distributed
from tsqlora.adapter.moments import inner_optimizer
from tsqlora.adapter.slots import Slots
from tsqlora.errors import SettingsError, UnsupportedError


def require_trained(layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer) -> None:
    """Refuses layers whose adapter is frozen, or is not among the optimizer's parameters."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for slots in layers.values():
        if not all(parameter.requires_grad for parameter, _ in slots.matrices()):
            raise UnsupportedError(
                f"the adapter of {slots.name} is frozen, and its rank would move all the same; unfreeze it, or leave "
                "the layer out of target_modules"
            )
        if any(id(parameter) not in trained for parameter, _ in slots.matrices()):
            raise SettingsError(
                f"the optimizer does not train the adapter of {slots.name}: the model was wrapped later, or parameters "
                "were chosen by the ends of names, which with slots are parametrizations.weight.original; make the "
                "optimizer from the parameters of the model that tsqlora.wrap gives"
            )


def told_of_steps(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> AbstractContextManager[Any]:
    """Until it is left, two methods are called around each step, whose object is not kept alive.

    Within a step they may be called again: by an optimizer that is made from another.
    """
    kept, hooks = inner_optimizer(optimizer), ExitStack()
    try:
        hooks.enter_context(kept.register_step_pre_hook(_as_hook(before)))
        hooks.enter_context(kept.register_step_post_hook(_as_hook(after)))
    except AttributeError:
        raise UnsupportedError(
            f"the optimizer {type(kept).__name__} never called Optimizer.__init__, so its steps cannot be followed; "
            "give the one that it wraps"
        ) from None
    return hooks


def finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every number of their gradients is finite; so where there are none."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return not grads or bool(distributed.whole(torch.nn.utils.get_total_norm(grads)).isfinite())


def _as_hook(method: Callable[[], None]) -> Callable[..., None]:
    known = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (there := known()) is not None:
            there()

    return hook
