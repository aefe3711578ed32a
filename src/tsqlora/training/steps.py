"""The steps of a Trainer: how many rows each has, which epoch it is in, and which ones begin something."""

import math
from dataclasses import dataclass
from typing import Any, cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import has_length

from tsqlora.quality.epochs import trusted_steps
from tsqlora.quality.subset import QualitySubset

EPOCH_ERROR = 1e-6
"""The Trainer counts epochs as a float; a step is a larger part of one than this."""
LOOK_AGAIN = 1 / 3
"""Share of a run's steps after which all rows are looked at again, at the next epoch's beginning."""


def epoch_of(state: TrainerState) -> int:
    """The current epoch, or the next one between two."""
    return int((state.epoch or 0) + EPOCH_ERROR)


def step_size(args: TrainingArguments, state: TrainerState) -> int:
    """Rows of an optimizer step, of every process."""
    lowered = state.train_batch_size if args.auto_find_batch_size else None
    processes = 1 if cast(AcceleratorConfig, args.accelerator_config).split_batches else args.world_size
    return (lowered or args.train_batch_size) * args.gradient_accumulation_steps * processes


def passed(data: Any, args: TrainingArguments, state: TrainerState) -> tuple[int, int]:
    """Number of rows of the last step, of every process, and of their tokens: 0 if lengths are unknown."""
    size = step_size(args, state)
    if not has_length(data):
        return size, 0
    batch = size // args.gradient_accumulation_steps
    rows = len(data) - len(data) % batch if args.dataloader_drop_last else len(data)
    begun = (state.global_step - 1) % max(1, -(-rows // size)) * size
    if not isinstance(data, QualitySubset) or data.lengths is None:
        return min(size, rows - begun), 0
    places = data.indices[begun : min(begun + size, rows)]
    return len(places), sum(data.lengths[row] for row in places.tolist())


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps of a run begin something."""

    trusted_step: int
    """From it on steps train on trusted rows; the run's last one where there are none."""
    trusted_from: tuple[int, int] | None
    """The same as an epoch and the place in it."""
    second_look: int | None
    """The epoch before which all rows are looked at again."""
    step_size: int
    """Rows of a step, of every process."""
    epoch_steps: int
    """Steps of an epoch."""

    @classmethod
    def of(cls, data: QualitySubset, args: TrainingArguments, state: TrainerState, batches: int) -> "Schedule":
        """Of a run whose epochs have so many batches."""
        a_step, total = step_size(args, state), state.max_steps
        an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        first = total - trusted_steps(total, data.plan.trusted, a_step)
        at = first
        if args.ignore_data_skip:  # a resumed epoch begins again at its first row, though its steps count on
            at = max(first, state.global_step) - state.global_step % an_epoch
        epoch, step = divmod(at, an_epoch)
        place = (epoch, min(step * a_step, len(data))) if first < total else None
        again = (e for e in range(1, math.ceil(total / an_epoch)) if LOOK_AGAIN * total <= e * an_epoch < first)
        return cls(first, place, next(again, None), a_step, an_epoch)
