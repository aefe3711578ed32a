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
PREFETCHED = 2
"""Batches that torch's DataLoader has each worker read ahead, by default."""
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

    asks_step: int
    """Behind it comes the question to the pool: the loader has read the rows of some further steps by then."""
    trusted_step: int
    """From it on the answer decides the rows; the run's last one where there are no trusted rows."""
    steps: int
    """Of the run."""
    second_look: int | None
    """The epoch before which all rows are looked at again."""
    step_size: int
    """Rows of a step, of every process."""
    epoch_steps: int
    """Steps of an epoch."""
    ahead: int
    """Steps whose rows the loader has read before they begin."""
    skipped: int = 0
    """Steps of its first epoch that a resumed run counts, though it begins the epoch again."""

    @classmethod
    def of(cls, data: QualitySubset, args: TrainingArguments, state: TrainerState, batches: int) -> "Schedule":
        """Of a run whose epochs have so many batches."""
        a_step, total = step_size(args, state), state.max_steps
        an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        first = total - trusted_steps(total, data.plan.trusted, a_step)
        # accelerate holds one batch, and each worker some more.
        held = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or PREFETCHED)
        ahead = math.ceil(held / args.gradient_accumulation_steps)
        planned = max(first - ahead, math.ceil(first / 2))
        asks = max(planned, state.global_step + 1)
        first = min(max(first, asks + ahead), total)
        again = (e for e in range(1, math.ceil(total / an_epoch)) if LOOK_AGAIN * total <= e * an_epoch < planned)
        # A resumed epoch may begin again at its first row, though its steps count on.
        skipped = state.global_step % an_epoch if args.ignore_data_skip else 0
        return cls(asks, first, total, next(again, None), a_step, an_epoch, ahead, skipped)

    @property
    def asks(self) -> bool:
        """Whether there are steps behind the question."""
        return self.trusted_step < self.steps

    def place_of(self, step: int) -> tuple[int, int]:
        """Return the epoch and the place in it of the first row behind this step."""
        epoch, rest = divmod(step - self.skipped, self.epoch_steps)
        return epoch, rest * self.step_size
