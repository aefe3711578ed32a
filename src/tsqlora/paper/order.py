"""The order of a step's calls in a custom loop, and the hooks that an interrupted training has left."""

import weakref
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from tsqlora import distributed
from tsqlora.errors import TsqLoraError
from tsqlora.training.nonfinite import call_around_steps

WHERE = {
    "before_forward": "before the step's first forward pass",
    "before_optimizer_step": "when the step's gradients are complete, before optimizer.step()",
    "after_optimizer_step": "after optimizer.step()",
}
"""The calls of a step in their order, and where each belongs."""


class StepOrder:
    """The next call of a step, and the number of completed steps.

    Args:
        parameters: if their gradients are not zero, a step of the optimizer is training's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.step, self.next = 0, "before_forward"
        self._parameters, self._stepped = parameters, False

    def watch(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
        """While it is open, optimizer.step() raises TsqLoraError if a call is missing."""
        return call_around_steps(optimizer, self._before_step, self._after_step)

    def expect(self, call: str) -> None:
        if self.next != call:
            raise TsqLoraError(f"{self.next}() is missing in step {self.step + 1}: call it {WHERE[self.next]}")

    def come(self, call: str) -> None:
        """Record this call; the one after it is next."""
        self.expect(call)
        calls = list(WHERE)
        self.next = calls[(calls.index(call) + 1) % len(calls)]
        if call == "before_optimizer_step":
            self._stepped = False
        if call == "after_optimizer_step":
            self.step += 1

    def _before_step(self, *_: Any) -> None:
        if self.next == "after_optimizer_step" and not self._stepped:
            return
        grads = [parameter.grad for parameter in self._parameters]
        # A step of zeros is torch.distributed.checkpoint's, which makes the optimizer's state in order to load it.
        if any(grad is not None and bool(distributed.full_tensor(grad).any()) for grad in grads):
            raise TsqLoraError(
                f"optimizer.step(): {self.next}() is missing in step {self.step + 1}: call it {WHERE[self.next]}; "
                "close() a RankLoop that is not used any more"
            )

    def _after_step(self, *_: Any) -> None:
        self._stepped = True  # an optimizer made from another calls its hooks twice


def take_over(model: nn.Module, tap: ExitStack) -> None:
    """Remove the hooks of an earlier training of the model that failed or was interrupted.

    That training's Trainer may still be alive, as in a notebook, which keeps the frames of the last error.
    """
    earlier = _TAPS[model]() if model in _TAPS else None
    for left in (earlier, tap):
        if left is not None:
            left.close()
    _TAPS[model] = weakref.ref(tap)


_TAPS: MutableMapping[nn.Module, weakref.ref[ExitStack]] = weakref.WeakKeyDictionary()
"""The hooks on each model, by weak references."""
