"""Each step of training, for progress bars."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.compat.transformers import live_note
from tsqlora.progress import Progress, Pulse
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.steps import passed

SPAN = 50
"""Steps over which speed is measured."""


class Pace:
    """Rows and tokens a second over the last steps."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.steps = deque[tuple[float, int, int]](maxlen=SPAN)

    def add(self, rows: int, tokens: int) -> tuple[float | None, float | None]:
        """Takes in a step that ends now; rates per second, None after the first step."""
        self.steps.append((self.clock(), rows, tokens))
        seconds = self.steps[-1][0] - self.steps[0][0]
        if len(self.steps) < 2 or seconds <= 0:
            return None, None
        done = list(self.steps)[1:]
        tokens_done = sum(tokens for _, _, tokens in done)
        return sum(rows for _, rows, _ in done) / seconds, tokens_done / seconds if tokens_done else None


class TellProgress(TrainerCallback):
    """Reports each step: how many are done, loss, learning rate, speed, slots moved, memory."""

    def __init__(self, data: QualitySubset, progress: Progress) -> None:
        self.data, self.progress = data, progress
        self.loss: float | None = None
        self.pace = Pace()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows, tokens = passed(self.data, args, state)
        rows_a_second, tokens_a_second = self.pace.add(rows, tokens)
        rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
        moved = sum(event.moved for event in live_note(state).get("record", {}).get("rank_events", ()))
        pulse = Pulse(self.loss, rate, rows_a_second, tokens_a_second, moved, peak_memory())
        self.progress("training", state.global_step, state.max_steps, pulse)


def peak_memory() -> int:
    """Bytes: of the GPU where torch has CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
