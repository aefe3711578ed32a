"""See each site's inputs and output gradients, sample by sample, during one backward pass.

Works on any forward and backward, also those of training, also under non-reentrant gradient
checkpointing (what a tap saves is recomputed like everything else), and also where nothing
trains: the tap's output requires a gradient because its anchor does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora.errors import UnsupportedError
from tsqlora.gradients.sites import Site

Consume = Callable[[str, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity, that shows the gradient passing through it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, a: Tensor, anchor: Tensor, deliver: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.deliver = deliver
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (a,) = ctx.saved_tensors
        ctx.deliver(a, grads[0])
        return grads[0], None, None, None


@dataclass(slots=True)
class Capture:
    """One capture under way: what was called in this forward, what has come back so far."""

    consume: Consume
    anchor: Tensor
    samples: int = 0
    recording: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    arrived: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def begin(self, samples: int) -> None:
        self.finish()
        self.samples, self.recording = samples, True
        self.calls.clear()
        self.arrived.clear()

    def called(self, name: str) -> None:
        # Checkpointing calls layers again inside the backward; those are not new uses.
        if self.recording:
            self.calls[name] = self.calls.get(name, 0) + 1

    def deliver(self, name: str, a: Tensor, b: Tensor) -> None:
        parts = self.arrived.setdefault(name, [])
        parts.append((a, b))
        if len(parts) == self.calls[name]:
            self._pass_on(name)

    def finish(self) -> None:
        """Passes on sites of which some call did not reach the loss: those calls add zero."""
        for name in list(self.arrived):
            self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        parts = self.arrived.pop(name)
        self.calls[name] = 0
        # A weight used twice has the gradient of both uses: concatenated along tokens,
        # their sum is taken before anything is squared.
        a = torch.cat([part for part, _ in parts], dim=1)
        b = torch.cat([part for _, part in parts], dim=1)
        with torch.no_grad():
            self.consume(name, a, b)


@contextmanager
def capture(model: nn.Module, sites: Mapping[str, Site], consume: Consume) -> Iterator[Capture]:
    """Calls `consume(site, a, b)` once a site and backward: a is n × t × i, b is n × t × o.

    b is the gradient of what is differentiated, so it is the sample's own only if that is a
    *sum* of the samples' losses. Nothing is left on the model afterwards, also on errors.
    Raises UnsupportedError if a site is called on something whose first dimension is not
    the batch's.
    """
    device = next(model.parameters()).device
    state = Capture(consume, torch.zeros((), device=device, requires_grad=True))
    with ExitStack() as hooks:
        enter = model.register_forward_pre_hook(
            lambda _m, args, kwargs: state.begin(_batch_size(args, kwargs)), with_kwargs=True
        )
        hooks.callback(enter.remove)
        for site in sites.values():
            for module in site.modules:
                hooks.callback(module.register_forward_hook(_tapper(state, site.name)).remove)
        leave = model.register_forward_hook(lambda *_: setattr(state, "recording", False))
        hooks.callback(leave.remove)
        yield state
        state.finish()


def by_sample(x: Tensor, samples: int, name: str) -> Tensor:
    """x as n × t × features: what lies between the first and the last dimension is tokens."""
    if x.dim() < 2 or x.shape[0] != samples:
        raise UnsupportedError(
            f"{name} is called on a tensor of shape {tuple(x.shape)} in a batch of {samples}: its samples cannot "
            "be told apart; give the layer inputs whose first dimension is the batch"
        )
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _tapper(state: Capture, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        state.called(name)
        samples = state.samples
        a = by_sample(args[0].detach(), samples, name)

        def deliver(a: Tensor, b: Tensor) -> None:
            state.deliver(name, a, by_sample(b, samples, name))

        return _Tap.apply(y, a, state.anchor, deliver)  # type: ignore[no-any-return]

    return hook


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise UnsupportedError("the model was called without a tensor, so its batch size is unknown")
