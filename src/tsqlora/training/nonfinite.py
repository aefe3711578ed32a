"""Steps whose loss or gradient is not finite are skipped and counted, in a stock Trainer."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.errors import TsqLoraError, UnsupportedError
from tsqlora.libs.accelerate import inner_optimizer, is_compiled, loss_scale
from tsqlora.training.checkpoints import fault, newest_first

LIMIT = 5
"""Skipped steps among the last 2·LIMIT that end a training."""
NAMED, LISTED = 100, 3
"""Skipped steps in the record, and in its note; all are counted."""


class FiniteSteps:
    """Skips each step whose loss or gradient is not finite: weights and moments stay, schedule and data continue.

    A skipped step counts as a step. It does not change the importance of slots; if it was to adjust ranks, the next
    step does. A gradient scaler skips steps itself while it looks for its scale; those count once the scale is below 1.
    """

    def __init__(self) -> None:
        self.skipped: list[int] = []
        """The steps, counted from 1."""
        self._parameters: list[nn.Parameter] = []
        self._bad = False
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)  # where training failed, at the latest on exit

    def begin(
        self, args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer, skipped: list[int]
    ) -> None:
        """Watch a training in which these steps have been skipped already, as far as its engine allows it."""
        self.close()
        self.skipped = skipped
        if args.deepspeed_plugin is not None:
            return
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._held.enter_context(call_around_steps(optimizer, self._before_step, self._after_step))
        # Compiled code runs no hook that came after it, and DataParallel runs it on parts of a batch, in threads;
        # gradients are looked at all the same.
        if not (args.torch_compile or is_compiled(model) or args.n_gpu > 1):
            self._held.callback(model.register_forward_hook(_spread).remove)

    def check(self, args: TrainingArguments, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        """Skip the step if its gradients, which are complete, are not finite.

        Raises TsqLoraError, with advice and the last complete checkpoint, after too many such steps.
        """
        if not self._parameters:
            return
        # The sum over processes is the same in all of them, and so is this.
        # A gradient scaler skips the step itself until its scale is low enough.
        scale = loss_scale(optimizer)
        norm = gradient_norm(self._parameters)
        self._bad = not (norm is None or bool(norm.isfinite())) and not (scale is not None and scale >= 1)
        if not self._bad:
            return
        self.skipped.append(state.global_step + 1)
        recent = self.skipped[-LIMIT:]
        if len(recent) == LIMIT and recent[-1] - recent[0] < 2 * LIMIT:
            self.close()
            raise TsqLoraError(self._advice(args, recent))

    def close(self) -> None:
        """Remove all hooks."""
        self._held.close()
        self._parameters = []

    def summary(self) -> dict[str, Any]:
        """For the record: the number of skipped steps and the first of them; empty if there are none."""
        steps = [{"step": step} for step in self.skipped[:NAMED]]
        return {"count": len(self.skipped), "steps": steps} if steps else {}

    def in_words(self) -> list[str]:
        """A note, if steps were skipped."""
        if not self.skipped:
            return []
        named = ", ".join(map(str, self.skipped[:LISTED])) + ", ..." * (len(self.skipped) > LISTED)
        return [f"{len(self.skipped)} steps were skipped whose loss or gradient was not finite: step {named}"]

    def _before_step(self, *_: Any) -> None:
        if self._bad:
            for parameter in self._parameters:
                parameter.grad = None  # an optimizer leaves such a parameter, and what it keeps of it, alone

    def _after_step(self, *_: Any) -> None:
        self._bad = False

    def _advice(self, args: TrainingArguments, recent: list[int]) -> str:
        first, last = recent[0], recent[-1]
        what = f"{LIMIT} of the last {last - first + 1} steps had a loss or gradient that is not finite"
        if len(self.skipped) == last:
            return (
                f"{what}, and no step before had a finite one: the base model's weights are not finite, or its dtype "
                "is too narrow; use float32 (bf16 and fp16 false), or another base"
            )
        earlier = (path for step, path in newest_first(Path(str(args.output_dir))) if step < first)
        start = next((path for path in earlier if fault(path) is None), None)
        back = "" if start is None else f"; the last complete checkpoint from before them is {start}"
        return (
            f"{what}, the last at step {last}; they were skipped, the weights are as before{back}. Look at the rows, "
            f"lower the learning rate ({args.learning_rate:g}), or compute in float32"
        )


def _spread(module: nn.Module, args: Any, output: Any) -> None:
    """Make the gradient of a loss that is not finite so, whatever it is made of; another's times 1 is unchanged."""
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if module.training and isinstance(loss, Tensor) and loss.requires_grad:
        factor = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        loss.register_hook(lambda grad: grad * factor)


def call_around_steps(
    optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]
) -> AbstractContextManager[Any]:
    """Context manager: call before() and after() around each optimizer.step(). Holds weak references.

    An optimizer that wraps another calls them twice within a step.
    """
    inner, hooks = inner_optimizer(optimizer), ExitStack()

    def weak(method: Callable[..., None]) -> Callable[..., None]:
        """A hook that calls a method as long as its object lives: a failed training leaves nothing behind."""
        reference = weakref.WeakMethod(method)

        def hook(*arguments: Any) -> None:
            if (there := reference()) is not None:
                there(*arguments)

        return hook

    try:
        hooks.enter_context(inner.register_step_pre_hook(weak(before)))
        hooks.enter_context(inner.register_step_post_hook(weak(after)))
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
