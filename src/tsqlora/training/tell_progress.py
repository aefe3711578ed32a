"""Each step of training, for progress bars."""

import resource
import sys
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.progress import Progress


class TellProgress(TrainerCallback):
    """Reports each step, with the last loss and the learning rate."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.loss = progress, ""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.loss = f"loss {logs['loss']:.4g}, "

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
            self.progress("training", state.global_step, state.max_steps, f"{self.loss}lr {rate:.3g}")


def peak_memory() -> int:
    """Bytes: of the GPU where torch has CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
