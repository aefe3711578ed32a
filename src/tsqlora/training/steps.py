"""The steps of a Trainer: how many rows each has, and which epoch it is in."""

from typing import cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from tsqlora.quality.subset import QualitySubset

EPOCH_ERROR = 1e-6
"""The Trainer counts epochs as a float; a step is a larger part of one than this."""


def epoch_of(state: TrainerState) -> int:
    """The current epoch, or the next one between two."""
    return int((state.epoch or 0) + EPOCH_ERROR)


def step_size(args: TrainingArguments, state: TrainerState) -> int:
    """Rows of an optimizer step, of every process."""
    lowered = state.train_batch_size if args.auto_find_batch_size else None
    processes = 1 if cast(AcceleratorConfig, args.accelerator_config).split_batches else args.world_size
    return (lowered or args.train_batch_size) * args.gradient_accumulation_steps * processes


def passed(data: QualitySubset, args: TrainingArguments, state: TrainerState) -> tuple[int, int]:
    """Number of rows of the last step, of every process, and of their tokens: 0 if lengths are unknown."""
    size = step_size(args, state)
    batch = size // args.gradient_accumulation_steps
    rows = len(data) - len(data) % batch if args.dataloader_drop_last else len(data)
    begun = (state.global_step - 1) % max(1, -(-rows // size)) * size
    places = data.indices[begun : min(begun + size, rows)]
    return len(places), 0 if data.lengths is None else sum(data.lengths[row] for row in places.tolist())
