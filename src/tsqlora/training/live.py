"""How a run goes while it trains: told after every step, and written to run.json every few seconds."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.progress import Progress, Pulse
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord

SPAN = 50
"""Steps over which speed is measured."""
EVERY = 3.0
"""Seconds between two writings of run.json."""
SHARE = 0.02
"""Of a run's time that writing it may take."""


class Pace:
    """Rows and tokens a second over the last steps of one phase."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.phase = ""
        self.steps = deque[tuple[float, int, int]](maxlen=SPAN)

    def add(self, phase: str, rows: int, tokens: int) -> tuple[float | None, float | None]:
        """Takes in a step that ends now; rates per second, None after the first step of a phase."""
        if phase != self.phase:
            self.phase = phase
            self.steps.clear()
        self.steps.append((self.clock(), rows, tokens))
        seconds = self.steps[-1][0] - self.steps[0][0]
        if len(self.steps) < 2 or seconds <= 0:
            return None, None
        done = list(self.steps)[1:]
        tokens_done = sum(tokens for _, _, tokens in done)
        return sum(rows for _, rows, _ in done) / seconds, tokens_done / seconds if tokens_done else None


class TellProgress(TrainerCallback):
    """Reports each step: how many of its phase are done, loss, learning rate, speed, slots moved, memory.

    Args:
        place: the phase that a step is of, its steps that are done and its steps in all.
    """

    def __init__(
        self,
        data: QualitySubset,
        ranks: RankCallback | None,
        progress: Progress,
        place: Callable[[TrainerState], tuple[str, int, int]],
    ) -> None:
        self.data, self.ranks, self.progress, self.place = data, ranks, progress, place
        self.loss: float | None = None
        self.pace = Pace()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        phase, done, total = self.place(state)
        rows = rows_of_step(self.data, args, state)
        lengths = self.data.lengths
        tokens = 0 if lengths is None else sum(lengths[row] for row in rows)
        rows_a_second, tokens_a_second = self.pace.add(phase, len(rows), tokens)
        rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
        moved = 0 if self.ranks is None else sum(event.moved for event in self.ranks.events)
        pulse = Pulse(self.loss, rate, rows_a_second, tokens_a_second, moved, peak_memory())
        self.progress(phase, done, total, pulse)


def rows_of_step(data: QualitySubset, args: TrainingArguments, state: TrainerState) -> Sequence[int]:
    """The rows on which the step that has just ended was trained, those of every process."""
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = -(-len(data) // size)
    place = (state.global_step - 1) % steps
    return data.indices[place * size : (place + 1) * size].tolist()


class KeepRecord(TrainerCallback):
    """Keeps run.json as the run is now, so that it can be looked at while it trains.

    Args:
        now: the record as it is at a step.
    """

    def __init__(self, run: Path, now: Callable[[TrainerState], RunRecord]) -> None:
        self.run, self.now = run, now
        self.due = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        begun = time.perf_counter()
        if not state.is_world_process_zero or begun < self.due:
            return
        self.now(state).save(self.run)
        took = time.perf_counter() - begun
        self.due = begun + took + max(EVERY, took / SHARE)


def peak_memory() -> int:
    """Bytes: of the GPU where torch has CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
