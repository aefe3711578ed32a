"""Steps whose loss or gradient is not finite are skipped, counted, and their rows named, in a stock Trainer."""

import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.compat.accelerate import is_compiled, loss_scale
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.checkpoints import fault, newest_first, read_state, write_state
from tsqlora.training.optimizer import call_around_steps, finite_gradients, weak_hook
from tsqlora.training.session import PartCallback, require_subset

GUARD_FILE = "tsqlora_guard.json"
"""The callback's state in a checkpoint."""
NAMED = 100
"""Skipped steps in the record; all are counted."""
LISTED = 3
"""Skipped steps in a note."""


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step whose loss or gradient was not finite."""

    step: int
    rows: list[int] | None
    """Of the training split; None if unknown."""

    def in_words(self) -> str:
        """The first eight of its rows, in words.

        >>> SkippedStep(3, [5, 1]).in_words(), SkippedStep(3, [*range(9)]).in_words(), SkippedStep(3, None).in_words()
        ('rows 5, 1', 'rows 0, 1, 2, 3, 4, 5, 6, 7, ...', 'its rows are unknown')
        """
        if self.rows is None:
            return "its rows are unknown"
        return f"rows {', '.join(map(str, self.rows[:8]))}{', ...' if len(self.rows) > 8 else ''}"


class GuardCallback(PartCallback):
    """Skips each step whose loss or gradient is not finite: weights and moments stay, schedule and data continue.

    A skipped step counts as a step. It does not change the importance of slots; if it was to adjust ranks, the next
    step does. `skipped` names such steps and their rows.

    Args:
        data: the Trainer's train_dataset; without it, or if dataloader workers read its rows, the rows of a skipped
            step are unknown.
        ids: the place of each of its rows in the file that it comes from, by which they are named.
        limit: if so many of the last 2·limit steps were skipped, training ends with a TsqLoraError, which gives advice
            and names the last complete checkpoint before them.

    A gradient scaler skips steps itself while it looks for its scale; those count once the scale is below 1.
    """

    name = "GuardCallback"

    def __init__(
        self,
        data: QualitySubset | None = None,
        *,
        limit: int = 5,
        ids: np.ndarray | None = None,
    ) -> None:
        if limit < 1:
            raise SettingsError(f"limit is {limit}; it must be at least 1")
        if data is not None:
            require_subset(data, self.name)
        self.data, self.limit, self.ids = data, limit, ids
        self.skipped: list[SkippedStep] = []
        """The first ones; `count` has all."""
        self.count = 0
        self._recent: deque[SkippedStep] = deque(maxlen=limit)
        self._coming: deque[int] = deque()
        self._rows: list[int] | None = []
        self._parameters: list[nn.Parameter] = []
        self.notes = list[str]()
        self._bad = False
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)  # where training failed, at the latest on exit

    def begin(self, args: TrainingArguments, state: TrainerState, resumed: Path | None, **kwargs: Any) -> None:
        self._held.close()
        saved: dict[str, Any] = {"skipped": [], "count": 0, "recent": []}
        if resumed is not None and (resumed / GUARD_FILE).exists():  # not where the run began without a guard
            saved = read_state(resumed / GUARD_FILE)
        self.skipped, self.count = [SkippedStep(**step) for step in saved["skipped"]], saved["count"]
        self._recent = deque((SkippedStep(**step) for step in saved["recent"]), maxlen=self.limit)
        model, optimizer, self.notes = kwargs["model"], kwargs["optimizer"], []
        if args.deepspeed_plugin is not None:
            self.notes.append("DeepSpeed takes its own steps, so steps that are not finite are not undone")
            self._parameters = []
            return
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._held.enter_context(call_around_steps(optimizer, self._before_step, self._after_step))
        # Compiled code runs no hook that came after it, and DataParallel runs it on parts of a batch, in threads;
        # gradients are looked at all the same.
        if not (args.torch_compile or is_compiled(model) or args.n_gpu > 1):
            self._held.callback(model.register_forward_hook(weak_hook(self._forward), with_kwargs=True).remove)
            if self.data is not None:
                self._held.enter_context(self.data.announcing(self._coming.extend))

    def begin_epoch(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        self._coming.clear()

    def begin_step(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        self._rows = []

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if not self._parameters:
            return
        # The sum over processes is the same in all of them, and so is this.
        # A gradient scaler skips the step itself until its scale is low enough.
        scale = loss_scale(kwargs["optimizer"])
        self._bad = not finite_gradients(self._parameters) and not (scale is not None and scale >= 1)
        if self._bad:
            self._skip(args, state)

    def save_part(self, folder: Path) -> None:
        steps = {"skipped": [*map(asdict, self.skipped)], "count": self.count, "recent": [*map(asdict, self._recent)]}
        write_state(folder / GUARD_FILE, steps)

    def end(self, state: TrainerState) -> None:
        self._held.close()

    def summary(self) -> dict[str, Any]:
        """For the record: notes, and the number of skipped steps and the first of them, if there are any."""
        if not self.count:
            return {"notes": list(self.notes)}
        named = "; ".join(f"step {step.step} ({step.in_words()})" for step in self.skipped[:LISTED])
        more = ", ..." if self.count > LISTED else ""
        return {
            "skipped": {"count": self.count, "steps": [asdict(step) for step in self.skipped]},
            "notes": [
                *self.notes,
                f"{self.count} steps were skipped whose loss or gradient was not finite: {named}{more}",
            ],
        }

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0)
        size = next(map(len, tensors), 0)
        if self._rows is None or size > len(self._coming):
            self._rows = None
        else:
            self._rows += [self._coming.popleft() for _ in range(size)]
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(loss, Tensor) and loss.requires_grad:
            # A loss that is not finite makes its gradient so, whatever it is made of; another's times 1 is unchanged.
            factor = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            loss.register_hook(lambda grad: grad * factor)

    def _before_step(self, *_: Any) -> None:
        if self._bad:
            for parameter in self._parameters:
                parameter.grad = None  # an optimizer leaves such a parameter, and what it keeps of it, alone

    def _after_step(self, *_: Any) -> None:
        self._bad = False

    def _skip(self, args: TrainingArguments, state: TrainerState) -> None:
        rows = distributed.gathered(self._rows)
        ids: list[int] | None = None
        if all(rows):
            # Trusted rows, which are numbered behind all others, have no place in that file.
            names: Any = () if self.ids is None else self.ids
            ids = [int(names[row]) if row < len(names) else row for part in rows for row in part or ()]
        step = SkippedStep(state.global_step + 1, ids)
        self.count += 1
        self._recent.append(step)
        if len(self.skipped) < NAMED:
            self.skipped.append(step)
        if len(self._recent) == self.limit and step.step - self._recent[0].step < 2 * self.limit:
            self._held.close()
            raise TsqLoraError(self._advice(args))

    def _advice(self, args: TrainingArguments) -> str:
        first, last = self._recent[0].step, self._recent[-1]
        what = f"{self.limit} of the last {last.step - first + 1} steps had a loss or gradient that is not finite"
        if self.count == last.step:
            return (
                f"{what}, and no step before had a finite one: the base model's weights are not finite, or its dtype "
                "is too narrow; use float32 (bf16 and fp16 false), or another base"
            )
        earlier = (path for step, path in newest_first(Path(str(args.output_dir))) if step < first)
        start = next((path for path in earlier if fault(path) is None), None)
        back = "" if start is None else f"; the last complete checkpoint from before them is {start}"
        return (
            f"{what}, the last at step {last.step} ({last.in_words()}); they were skipped, the weights are as before"
            f"{back}. Look at the rows, lower the learning rate ({args.learning_rate:g}), or compute in float32"
        )
