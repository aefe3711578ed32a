"""Draw each epoch's rows in a stock Trainer: accelerate calls a data set's set_epoch only with some samplers."""

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
    """The current epoch, or the next one between two."""
    return int((state.epoch or 0) + EPOCH_ERROR)


def draw_epoch(data: QualitySubset | None, state: TrainerState, by: str) -> None:
    """On epoch begin: draw its rows, unless another callback does."""
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
"""Callbacks that may draw, and their parts of a checkpoint (`checkpoints.register_part`)."""


def forget_absent(data: QualitySubset, state: TrainerState) -> None:
    """On epoch begin: undo the draws of callbacks of an earlier training that this one lacks.

    Scores set by `data.use` stay.
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
    """Raises SettingsError for rows that callbacks cannot draw."""
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
    """On train end: from now on `set_epoch` draws."""
    if data is not None and data.drawn_by == by:
        data.drawn_by = None


def refuse_evaluation(data: QualitySubset | None, kwargs: Mapping[str, Any]) -> None:
    """On a prediction step: raises SettingsError if the training data set itself is evaluated.

    Its rows would count as handed out for training.
    """
    if data is not None and data.drawn_by is not None and kwargs["eval_dataloader"].dataset is data:
        raise SettingsError(
            "eval_dataset is the QualitySubset that is trained on; to evaluate on training rows give "
            "another data set: torch.utils.data.Subset(rows, data.draw(0))"
        )


def require_drawn_anew(args: TrainingArguments, loader: DataLoader[Any]) -> None:
    """On train begin: raises SettingsError for loaders that keep an earlier draw."""
    if not isinstance(loader.dataset, QualitySubset):
        return
    if args.dataloader_persistent_workers:
        raise SettingsError("dataloader_persistent_workers keeps an old draw; set it to False")
    require_by_place(loader)


def require_by_place(loader: DataLoader[Any]) -> None:
    """Refuse samplers that group rows by length or undo such an order; warn of other custom samplers.

    They are made once, from the first draw; the next one has other rows in the same places.
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
            f"the Trainer's sampler is a {type(sampler).__name__}; it fits the first draw "
            "only, since a QualitySubset has other rows in the next epoch",
            stacklevel=3,
        )
