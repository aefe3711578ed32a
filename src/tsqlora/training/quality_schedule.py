"""When a run trains on trusted rows, and when it looks at all rows again."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from tsqlora.quality.epochs import trusted_steps
from tsqlora.quality.subset import QualitySubset

LOOK_AGAIN = 1 / 3
"""Share of a run's steps after which all rows are looked at again, at the next epoch's beginning."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps of a run begin something."""

    trusted_step: int
    """From it on steps train on trusted rows; the run's last one where there are none."""
    trusted_from: tuple[int, int] | None
    """The same as an epoch and the place in it."""
    second_look: int | None
    """The epoch before which all rows are looked at again."""

    @classmethod
    def of(cls, data: QualitySubset, args: TrainingArguments, total: int, batches: int) -> "Schedule":
        """Of a run of so many optimizer steps, whose epochs have so many batches."""
        accumulated = args.gradient_accumulation_steps
        an_epoch = max(1, math.ceil(batches / accumulated))
        a_step = args.train_batch_size * accumulated * args.world_size
        first = total - trusted_steps(total, data.plan.trusted, a_step)
        epoch, step = divmod(first, an_epoch)
        place = (epoch, min(step * a_step, len(data))) if first < total else None
        epochs = range(1, math.ceil(total / an_epoch))
        again = (e for e in epochs if LOOK_AGAIN * total <= e * an_epoch < first)
        return cls(first, place, next(again, None))
