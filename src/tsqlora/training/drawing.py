"""Which epoch's rows a stock Trainer has: a callback draws them, since accelerate tells a data set its epoch only
under some samplers."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from transformers import TrainerControl, TrainerState, TrainingArguments

from tsqlora.compat.accelerate import inner_batch_sampler
from tsqlora.compat.transformers import knows_lengths
from tsqlora.errors import SettingsError
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.checkpoints import registered_parts

EPOCH_ERROR = 1e-6
"""The Trainer counts epochs as a float; a step is a larger part of one than this."""


def epoch_of(state: TrainerState) -> int:
    """The epoch that is under way or about to begin."""
    return int((state.epoch or 0) + EPOCH_ERROR)


def draw_epoch(data: QualitySubset | None, state: TrainerState, by: str) -> None:
    """On epoch begin: its rows, unless another callback draws them."""
    if data is None:
        return
    forget_absent(data, state)
    if data.drawn_by in (None, by):
        data.begin_epoch(epoch_of(state), by)


_PARTS = {
    "QualityCallback": "quality",
    "RankCallback": "ranks",
    "GuardCallback": "guard",
}
"""What each callback that may draw is called among those which the Trainer has (`checkpoints.register_part`)."""


def forget_absent(data: QualitySubset, state: TrainerState) -> None:
    """On epoch begin: takes back what callbacks of an earlier training have left, and this one has not.

    Scores that were given by hand (`data.use`) stay.
    """
    present = registered_parts(state)
    if present is None:
        return
    absent = {name for name, part in _PARTS.items() if part not in present}
    if data.plan.by in absent:
        data.plan, data.task = data.plan.unscored(), None
    if data.drawn_by in absent:
        data.drawn_by = None


def require_subset(data: Any, name: str) -> None:
    """Raises SettingsError for rows that no callback can draw, or be told of."""
    if not isinstance(data, QualitySubset):
        raise SettingsError(
            f"{name} got a {type(data).__name__}; it goes with a QualitySubset: make data = "
            "tsqlora.QualitySubset(rows), and give it to the Trainer too"
        )


def refuse_cut_epoch(data: QualitySubset | None, state: TrainerState, control: TrainerControl) -> None:
    """On epoch end: raises SettingsError where a callback ended an epoch before its last row, and another follows."""
    epoch = state.epoch or 0
    cut = control.should_epoch_stop and not control.should_training_stop and epoch - epoch_of(state) > EPOCH_ERROR
    if data is not None and cut and epoch_of(state) + 1 < state.num_train_epochs:
        raise SettingsError(
            f"a callback ended epoch {epoch_of(state)} before its end (control.should_epoch_stop), and a QualitySubset "
            "is drawn, scored and resumed by whole epochs; lower its fraction, or set control.should_training_stop"
        )


def leave(data: QualitySubset | None, by: str) -> None:
    """On train end: from now on whoever calls `set_epoch` draws."""
    if data is not None and data.drawn_by == by:
        data.drawn_by = None


def refuse_evaluation(data: QualitySubset | None, known: Mapping[str, Any]) -> None:
    """On a prediction step: raises SettingsError where the rows that are trained on are evaluated by the same object.

    Its rows would count as handed out for training.
    """
    if data is not None and data.drawn_by is not None and known["eval_dataloader"].dataset is data:
        raise SettingsError(
            "eval_dataset is the QualitySubset that is trained on; to evaluate on training rows give a data set of its "
            "own: torch.utils.data.Subset(rows, data.draw(0))"
        )


def require_drawn_anew(args: TrainingArguments, loader: DataLoader[Any]) -> None:
    """On train begin of whoever draws epochs: raises SettingsError for loaders that keep an earlier draw."""
    if not isinstance(loader.dataset, QualitySubset):
        return
    if args.dataloader_persistent_workers:
        raise SettingsError("dataloader_persistent_workers keeps an old draw; set it to False")
    require_by_place(loader)


def require_by_place(loader: DataLoader[Any]) -> None:
    """Refuses samplers that group rows by length or undo such an order, and warns of others that may know the rows.

    They are made once, of the first draw; in the next one other rows are in the places that they know.
    """
    batches = inner_batch_sampler(loader.batch_sampler)
    sampler = getattr(batches, "sampler", batches)
    if knows_lengths(sampler):
        raise SettingsError(
            f"{type(sampler).__name__} reads the rows' lengths once, and a QualitySubset has other rows in the next "
            "epoch; leave train_sampling_strategy out of the TrainingArguments, or set it to 'sequential' and let "
            "QualitySubset(rows, lengths=..., batch_size=...) group them"
        )
    data: Any = loader.dataset
    if isinstance(sampler, RandomSampler) and data.lengths is not None:
        raise SettingsError(
            "QualitySubset(lengths=..., batch_size=...) puts rows of like length together, and the Trainer's sampler "
            "mixes them again; set train_sampling_strategy to 'sequential', or leave lengths and batch_size out"
        )
    if not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler | None):
        warnings.warn(
            f"the Trainer's sampler is a {type(sampler).__name__}; what it knows of rows by their places holds for the "
            "first draw alone, since a QualitySubset has other rows in the next epoch",
            stacklevel=3,
        )
