"""Each step for progress bars, and each decision about rows and ranks for TensorBoard, MLflow, W&B and the like."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.compat.transformers import callbacks_of, reporter_kinds
from tsqlora.progress import Progress, Pulse
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.steps import passed


class ReportCallback(TrainerCallback):
    """Reports what QualityCallback and RankCallback decide to the Trainer's reporters, in the step of the decision.

        trainer = Trainer(model, args, callbacks=[quality, ranks])
        trainer.add_callback(tsq.ReportCallback(trainer))

    At each adjustment reporters get `ranks/moved`, `ranks/parameters`, `ranks/least`, `ranks/most`, and of each layer
    `rank/LAYER` and `sensitivity/LAYER`; when rows are scored `quality/left_out`, `quality/effective_sample_size`
    and, for classes, `quality/wrong_labels` (the estimated share). `tsqlora train` adds this callback where
    `training.report_to` is set.
    """

    def __init__(self, trainer: Trainer) -> None:
        callbacks = callbacks_of(trainer)
        kinds = reporter_kinds(trainer.args.report_to)
        self.reporters = [callback for callback in callbacks if isinstance(callback, kinds)]
        self.ranks = next((callback for callback in callbacks if isinstance(callback, RankCallback)), None)
        self.quality = next((callback for callback in callbacks if isinstance(callback, QualityCallback)), None)
        self.adjusted, self.looks = -1, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        # A resumed run's earlier decisions were reported when they were made.
        self.adjusted = self.ranks.events[-1].step if self.ranks is not None and self.ranks.events else -1
        self.looks = 0 if self.quality is None or state.global_step == 0 else len(self.quality.looks)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        scalars: dict[str, float] = {}
        if self.quality is not None and len(self.quality.looks) > self.looks:
            self.looks = len(self.quality.looks)
            if (scores := self.quality.data.scores) is not None:
                scalars["quality/left_out"] = int((~scores.kept).sum())
                scalars["quality/effective_sample_size"] = scores.record.effective_sample_size
                if (noise := scores.record.noise) is not None:
                    scalars["quality/wrong_labels"] = noise["rate"] if noise["evident"] else 0.0
        # By step, not by place: of many events the older ones are thinned out.
        for event in [] if self.ranks is None else self.ranks.events:
            if event.step > self.adjusted:
                self.adjusted, ranks = event.step, event.ranks.values()
                decided = {"moved": event.moved, "parameters": event.used, "least": min(ranks), "most": max(ranks)}
                for prefix, values in (("ranks", decided), ("rank", event.ranks), ("sensitivity", event.sensitivity)):
                    scalars |= {f"{prefix}/{name}": value for name, value in values.items()}
        for reporter in self.reporters if scalars else ():
            # Not Trainer.log: that would end the interval over which the loss is averaged.
            reporter.on_log(args, state, control, model=kwargs["model"], logs=dict(scalars))


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

    def __init__(self, data: QualitySubset, ranks: RankCallback | None, progress: Progress) -> None:
        self.data, self.ranks, self.progress = data, ranks, progress
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
        moved = 0 if self.ranks is None else sum(event.moved for event in self.ranks.events)
        pulse = Pulse(self.loss, rate, rows_a_second, tokens_a_second, moved, peak_memory())
        self.progress("training", state.global_step, state.max_steps, pulse)


def peak_memory() -> int:
    """Bytes: of the GPU where torch has CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
