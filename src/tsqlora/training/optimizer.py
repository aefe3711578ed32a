"""Hooks around an optimizer's steps, and the norm of its gradients."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.compat.accelerate import inner_optimizer
from tsqlora.errors import UnsupportedError


def call_around_steps(
    optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]
) -> AbstractContextManager[Any]:
    """Context manager: call before() and after() around each optimizer.step(). Holds weak references.

    An optimizer that wraps another calls them twice within a step.
    """
    inner, hooks = inner_optimizer(optimizer), ExitStack()
    try:
        hooks.enter_context(inner.register_step_pre_hook(weak_hook(before)))
        hooks.enter_context(inner.register_step_post_hook(weak_hook(after)))
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


def weak_hook(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that calls a method as long as its object lives: a failed training leaves nothing behind."""
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        if (there := reference()) is not None:
            there(*arguments)

    return hook
