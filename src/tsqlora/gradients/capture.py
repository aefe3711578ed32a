"""See each site's inputs and output gradients, sample by sample, during backward passes.

Works on any forward and backward, also those of training, also under non-reentrant gradient
checkpointing (what a tap saves is recomputed like everything else), and also where nothing
trains: the tap's output requires a gradient because its anchor does.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tsqlora.compat.torch import is_view
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.layers import call_input
from tsqlora.gradients.sites import Site, seen

Consume = Callable[[str, Tensor, Tensor], None]
"""(site, a: n × t × i, or indices n × t of an Embedding, b: n × t × o)."""


@dataclass(frozen=True, slots=True)
class _Forward:
    """One forward pass: how often each site was called, and which calls' gradients are back."""

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
        """Passes on sites of which some call did not reach the loss: such a call adds zero."""
        for name in list(self.arrived):
            self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        calls = self.arrived.pop(name)
        # A weight used twice has the gradient of both uses: concatenated along tokens,
        # their sum is taken before anything is squared.
        a, b = calls[0] if len(calls) == 1 else (torch.cat(parts, dim=1) for parts in zip(*calls, strict=True))
        # What is made of them must not round as training's forward may.
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            self.consume(name, a, b)


@dataclass(slots=True)
class Capture:
    """A capture that is open."""

    anchor: Tensor
    """What to differentiate by where no parameter's own gradient is wanted."""
    forwards: list[_Forward] = field(default_factory=list[_Forward])
    current: _Forward | None = None
    """The forward pass under way; None in a backward pass, also where that calls layers again."""

    def begin(self, samples: int, consume: Consume) -> None:
        self.finish()
        self.current = _Forward(samples, consume)
        self.forwards.append(self.current)

    def finish(self) -> None:
        for forward in self.forwards:
            forward.finish()


class _Tap(torch.autograd.Function):
    """The identity, that shows the gradient passing through it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, site: Site, module: nn.Module, under_way: _Forward | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site, ctx.module, ctx.under_way = site, module, under_way
        # Passed on as it is, as if changed in place: a model may change what it gets, and autograd lets it do
        # that to a dirty tensor or to a copy, not to a view.
        if is_view(y):
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        # Non-reentrant checkpointing calls layers again only to have their inputs back.
        if ctx.under_way is None:
            raise UnsupportedError(
                f"{ctx.site.name} is under reentrant gradient checkpointing, or was called by a forward that passes by "
                "the model's own, which hides it; set gradient_checkpointing_kwargs to {'use_reentrant': False}, and "
                "in a compute_loss of your own call the model itself, not modules in it"
            )
        (x,) = ctx.saved_tensors
        ctx.under_way.deliver(ctx.site, ctx.module, x, grad_outputs[0])
        return grad_outputs[0], None, None, None, None, None


@contextmanager
def capture(model: nn.Module, sites: Mapping[str, Site], consume: Consume) -> Generator[Capture]:
    """Calls `consume(site, a, b)` once for each site and pass: what `site.kind` makes gradients of.

    b is the gradient of what is differentiated, so it is the sample's own only if that is a
    *sum* of the samples' losses. Nothing is left on the model afterwards, also on errors.
    Raises UnsupportedError, in the backward pass, for a site called on something whose first
    dimension is not the batch's, under reentrant gradient checkpointing, and where the model's own forward was
    passed by.
    """
    device = next(model.parameters()).device
    state = Capture(torch.zeros((), device=device, requires_grad=True))

    def enter(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.begin(_batch_size(args, kwargs), consume)

    def leave(_model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        state.current = None

    with ExitStack() as hooks:
        # Compiled code would not call hooks that came after it.
        hooks.enter_context(cast(Any, torch.compiler).set_stance("force_eager"))
        hooks.callback(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for site in sites.values():
            for module in site.modules:
                # First of the module's hooks: others may change what it returns.
                tap = partial(_tap, state, site)
                hooks.callback(module.register_forward_hook(tap, prepend=True, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(leave).remove)
        yield state
        state.finish()


def _tap(
    state: Capture, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
) -> Tensor | None:
    """A forward hook: the output, tapped where gradients are wanted."""
    if not torch.is_grad_enabled():
        return None
    if state.current is not None:
        state.current.called(site.name)
    return cast(Any, _Tap).apply(y, call_input(args, kwargs).detach(), state.anchor, site, module, state.current)


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in _tensors((*args, *kwargs.values())):
        if value.dim() > 0:
            return value.shape[0]
    raise UnsupportedError("the model was called without a tensor, so its batch size is unknown")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among them, and in dicts among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(cast("Mapping[str, Any]", value).values())
