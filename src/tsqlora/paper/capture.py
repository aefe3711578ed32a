"""Hooks on sites: `capture` their inputs and output gradients per sample, and compute as if each sample had `stepped`.

Capturing works with any forward and backward pass: those of training, non-reentrant gradient checkpointing (which
recomputes what a tap saves), and frozen models, because the tap's output requires a gradient through its anchor.

A step on sample i changes its layer's output by −η x ∇Wᵢᵀ, so the outputs are stepped and no weight changes:
(W − η∇Wᵢ)x = Wx − η(x aᵢᵀ)bᵢ.  A and B of a LoRA layer are two sites, which includes the η² term.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tsqlora.errors import UnsupportedError
from tsqlora.libs.torch import is_view
from tsqlora.paper.ghost import LayerGradient
from tsqlora.paper.sites import Site, call_input, seen, stepped_output

Consume = Callable[[str, Tensor, Tensor], None]
"""(site, a: n × t × i, or for an Embedding indices n × t, b: n × t × o)."""


@dataclass(frozen=True, slots=True)
class _Forward:
    """One forward pass: how often it called each site, and the gradients that have arrived."""

    samples: int
    consume: Consume
    calls: dict[str, int] = field(default_factory=dict[str, int])
    arrived: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict[str, list[tuple[Tensor, Tensor]]])

    def called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def deliver(self, site: Site, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            arrived = seen(site, module, x, grad, self.samples)
        calls = self.arrived.setdefault(site.name, [])
        calls.append(arrived)
        if len(calls) == self.calls[site.name]:
            self._pass_on(site.name)

    def finish(self) -> None:
        """Pass on sites with calls that did not reach the loss; such a call adds zero."""
        for name in list(self.arrived):
            self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        calls = self.arrived.pop(name)
        # The gradient of a weight used twice is the sum over both uses, so calls are concatenated along tokens before
        # anything is squared.
        a, b = calls[0] if len(calls) == 1 else (torch.cat(parts, dim=1) for parts in zip(*calls, strict=True))
        # Without autocast: consumers must not round as training's forward may.
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            self.consume(name, a, b)


@dataclass(slots=True)
class Capture:
    """The state of an open capture."""

    anchor: Tensor
    """Differentiate with respect to this where no parameter gradient is needed."""
    forwards: list[_Forward] = field(default_factory=list[_Forward])
    current: _Forward | None = None
    """The running forward pass; None in a backward pass, even where it recomputes layers."""

    def begin(self, samples: int, consume: Consume) -> None:
        self.finish()
        self.current = _Forward(samples, consume)
        self.forwards.append(self.current)

    def finish(self) -> None:
        for forward in self.forwards:
            forward.finish()


class _Tap(torch.autograd.Function):
    """The identity, which reports the gradient that passes through it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, site: Site, module: nn.Module, current: _Forward | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site, ctx.module, ctx.current = site, module, current
        # Marked dirty, because the model may change the output in place, which autograd allows for a dirty tensor or a
        # copy, but not for a view.
        if is_view(y):
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        # Non-reentrant checkpointing recomputes layers only for their inputs and keeps the first tap.
        if ctx.current is None:
            raise UnsupportedError(
                f"{ctx.site.name} is under reentrant gradient checkpointing, or was not called through the model's "
                "forward; set gradient_checkpointing_kwargs to {'use_reentrant': False}, and in a custom compute_loss "
                "call the model itself, not its modules"
            )
        (x,) = ctx.saved_tensors
        ctx.current.deliver(ctx.site, ctx.module, x, grad_outputs[0])
        return grad_outputs[0], None, None, None, None, None


@contextmanager
def capture(model: nn.Module, sites: Mapping[str, Site], consume: Consume) -> Generator[Capture]:
    """Call `consume(site, a, b)` once per site and pass, with the inputs of `site.kind`'s gradient.

    b belongs to one sample only if the differentiated value is a *sum* of sample losses. All hooks are removed
    afterwards, also after errors. The backward pass raises UnsupportedError for a site whose input does not have the
    batch as first dimension, under reentrant gradient checkpointing, and where the model's forward was bypassed.
    """
    state = Capture(torch.zeros((), device=next(model.parameters()).device, requires_grad=True))

    def enter(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values: list[Any] = [*args, *kwargs.values()]
        while values:
            value = values.pop(0)
            if isinstance(value, Mapping):
                values[:0] = cast("Mapping[str, Any]", value).values()
            elif isinstance(value, Tensor) and value.dim() > 0:
                return state.begin(value.shape[0], consume)
        raise UnsupportedError("the model was called without a tensor, so its batch size is unknown")

    def leave(_model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        state.current = None

    with ExitStack() as hooks:
        # Compiled code ignores hooks that were added after compilation.
        hooks.enter_context(cast(Any, torch.compiler).set_stance("force_eager"))
        hooks.callback(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for site in sites.values():
            for module in site.modules:
                # Before the module's other hooks, which may change the output.
                tap = partial(_tap, state, site)
                hooks.callback(module.register_forward_hook(tap, prepend=True, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(leave).remove)
        yield state
        state.finish()


def _tap(
    state: Capture, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
) -> Tensor | None:
    """Forward hook: tap the output where gradients are enabled."""
    if not torch.is_grad_enabled():
        return None
    if state.current is not None:
        state.current.called(site.name)
    return cast(Any, _Tap).apply(y, call_input(args, kwargs).detach(), state.anchor, site, module, state.current)


@contextmanager
def stepped(
    sites: Mapping[str, Site], gradients: Mapping[str, LayerGradient], *, eta: float, samples: int
) -> Generator[None]:
    """While open, a forward pass on the same batch uses each sample's stepped weights.

    A site without a gradient did not reach the loss and is not stepped.
    """

    def step(site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        # A sample may have several rows of the batch, one after another.
        x = call_input(args, kwargs)
        x = x.reshape(samples, len(x) // samples, *x.shape[1:])
        change = stepped_output(site, module, gradients[site.name], x, samples)
        return y.sub(change.to(y.dtype).reshape(y.shape), alpha=eta)

    with ExitStack() as hooks:
        for name in gradients:
            for module in sites[name].modules:
                # Before the module's other hooks, as the tap was.
                hook = partial(step, sites[name])
                hooks.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield
