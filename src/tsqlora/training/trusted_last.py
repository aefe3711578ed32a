"""Trusted rows come last: whether they can, how a loader reads them, and what early stopping does to them."""

from dataclasses import replace
from inspect import signature
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerControl, TrainerState, TrainingArguments

from tsqlora.compat.accelerate import inner_batch_sampler
from tsqlora.errors import SettingsError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.rows import Dataset
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import Collate, Task
from tsqlora.training.steps import EPOCH_ERROR, Schedule

ENOUGH_TRUSTED = 32
"""With 16 trusted rows one of three trials learned the reverse of a shortcut; with 32 none did."""


def come_last(trusted: Dataset, task: Task, model: nn.Module, collate: Collate) -> tuple[bool, int]:
    """Whether trusted rows come last, and how many classes have none of them.

    Texts and pairs do not, and neither do rows that lack a class, which would be forgotten.
    """
    if task.writer is not None or task.reading.has_reference:
        return False, 0
    if task.reading.label is None:
        return True, 0
    with eval_mode(model):  # reading rows may draw random numbers, as augmentation does
        parts = [collate([trusted[j]])["labels"] for j in range(len(trusted))]
    present = task.reading.label.present([labels.numpy(force=True) for labels in parts])
    lacking = max(0, getattr(getattr(model, "config", None), "num_labels", present) - present)
    return not lacking, lacking


def read_in_order(loader: Any, data: QualitySubset) -> None:
    """Make a loader read the rows in the draw's order.  Raises SettingsError for one that mixes them for good."""
    if isinstance(loader, DataLoaderShard | DataLoaderDispatcher):
        loader.set_sampler(SequentialSampler(data))
        return
    batches = inner_batch_sampler(loader.batch_sampler)
    sampler = getattr(batches, "sampler", batches)
    if not isinstance(sampler, SequentialSampler):
        raise SettingsError(
            f"the Trainer's own get_train_dataloader mixes the rows ({type(sampler).__name__}), and trusted rows come "
            "last; return a DataLoader without shuffle, or leave the method out and set train_sampling_strategy to "
            "'sequential'"
        )


def stopped_early(data: QualitySubset, schedule: Schedule, state: TrainerState, control: TrainerControl) -> bool:
    """Whether EarlyStoppingCallback has ended the run before the steps of the trusted rows."""
    at = state.global_step
    if data.plan.trusted_from is None or not control.should_training_stop or at >= schedule.trusted_step:
        return False
    evaluated = any(name.startswith("eval_") for log in state.log_history if log["step"] == at for name in log)
    return evaluated and "EarlyStoppingCallback" in (state.stateful_callbacks or ())


def jump(
    data: QualitySubset,
    schedule: Schedule,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    rates: Any,
    *,
    epoch_ends: bool,
) -> None:
    """Go on with the steps of the trusted rows; `rates` is the scheduler of the learning rate."""
    place = int(((state.epoch or 0) - data.epoch) * schedule.epoch_steps + EPOCH_ERROR) * schedule.step_size
    # Workers have read ahead, from a copy of the draw.
    epoch_ends |= args.dataloader_num_workers > 0 or place >= len(data)
    data.plan = replace(data.plan, trusted_from=(data.epoch + 1, 0) if epoch_ends else (data.epoch, place))
    if not epoch_ends:
        data.begin_epoch(data.epoch, "QualityCallback")
    control.should_training_stop, control.should_epoch_stop = False, epoch_ends
    if "metrics" not in signature(rates.step).parameters:  # a plateau's rate falls by evaluations, not by steps
        for _ in range(schedule.trusted_step - state.global_step):
            rates.step()
    state.global_step, state.best_metric = schedule.trusted_step, None


def never_reached(schedule: Schedule, state: TrainerState) -> str:
    """Say that a run ended before the trusted rows; empty if it did not."""
    if state.global_step > schedule.trusted_step:
        return ""
    return (
        f"training ended at step {state.global_step}, before the trusted rows, which come from step "
        f"{schedule.trusted_step} on; train longer, or stop later"
    )


def too_few(trusted: int) -> str:
    """Say that so many trusted rows may be too few; empty if they are enough."""
    if trusted >= ENOUGH_TRUSTED:
        return ""
    return f"{trusted} trusted rows may be too few: with 16 one of three trials failed; give {ENOUGH_TRUSTED} or more"
