"""What our callbacks share in a stock Trainer: the draw of each epoch, the parts of checkpoints, and run.json."""

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.compat.accelerate import inner_batch_sampler
from tsqlora.compat.transformers import knows_lengths
from tsqlora.errors import SettingsError
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.checkpoints import EPOCH_ERROR, Checkpoints, checkpoint_folder, epoch_of
from tsqlora.training.recorder import Recorder, own_recorder


class Training:
    """One training of a Trainer: its checkpoints and its record."""

    def __init__(self, args: TrainingArguments, state: TrainerState) -> None:
        self.checkpoints = Checkpoints(args, state)
        self.recorder: Recorder | None = None


_TRAININGS: dict[int, Training] = {}
"""By the id of the TrainerState, the only object that callbacks share."""


class PartCallback(TrainerCallback, ABC):
    """A callback with a part in every checkpoint and in run.json.

    It answers the Trainer's events, and calls the methods below `begin`, which each callback fills in. Of several
    callbacks one draws the epochs, the last one records a step, and a checkpoint is complete once all have written.
    """

    name: ClassVar[str]
    """The class's public name, for messages and draws."""
    data: QualitySubset | None = None
    """The Trainer's rows; None: those of its loader, if they are drawn."""
    notes: list[str]
    """Warnings, for the record."""
    recorder: Recorder | None = None
    """The Recorder of `tsqlora train`; None: one that the callbacks of a Trainer share."""

    @abstractmethod
    def begin(self, args: TrainingArguments, state: TrainerState, resumed: Path | None, **kwargs: Any) -> None:
        """Begin a training, from the checkpoint `resumed` if there is one."""

    def begin_epoch(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Before the rows of an epoch are drawn."""

    def begin_step(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Before the first forward pass of a step."""

    def end_step(self) -> None:
        """After a step of the optimizer."""

    @abstractmethod
    def save_part(self, folder: Path) -> None:
        """Write the callback's state into a checkpoint."""

    def end(self, state: TrainerState) -> None:
        """After the last step."""

    @property
    def spent(self) -> dict[str, PhaseCost]:
        """Cost of each of its phases until now, beside training's own."""
        return {}

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Current fields of RunRecord; `notes` and `settings` are added to those of the other callbacks."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_fresh_draws(args, kwargs["train_dataloader"])
        if id(state) not in _TRAININGS:
            _TRAININGS[id(state)] = Training(args, state)
            weakref.finalize(state, _TRAININGS.pop, id(state), None)
        training = _TRAININGS[id(state)]
        if self.name in training.checkpoints.parts:
            raise SettingsError(f"the Trainer has two {self.name}s; give it one of each kind at most")
        training.checkpoints.parts.append(self.name)
        self.begin(args, state, training.checkpoints.resumed, **kwargs)
        if training.recorder is None:
            data = kwargs["train_dataloader"].dataset
            training.recorder = self.recorder or own_recorder(args, state, kwargs["model"], data)
            training.recorder.begin(state)
        training.recorder.add(self)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        data, training = self._drawn_rows(kwargs), _TRAININGS.get(id(state))
        if training is not None:
            training.checkpoints.set_aside_later()
            if data is not None:
                _forget_absent(data, training.checkpoints.parts)
        self.begin_epoch(args, state, **kwargs)
        if data is not None and data.drawn_by in (None, self.name):
            data.begin_epoch(epoch_of(state), self.name)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_epoch_stop and not control.should_training_stop:
            # The Trainer counts on, but its state would be within this epoch, and the next one draw the same rows.
            state.epoch = float(math.ceil((state.epoch or 0) - EPOCH_ERROR))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        data = self._drawn_rows(kwargs)
        # Its rows would count as handed out for training.
        if data is not None and data.drawn_by is not None and kwargs["eval_dataloader"].dataset is data:
            raise SettingsError(
                "eval_dataset is the QualitySubset that is trained on; to evaluate on training rows give "
                "another data set: torch.utils.data.Subset(rows, data.draw(0))"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin_step(args, state, **kwargs)
        if recorder := self._last_recorder(state):
            recorder.begin_step(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.end_step()
        if recorder := self._last_recorder(state):
            recorder.end_step(args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if recorder := self._last_recorder(state):
            recorder.evaluated(state, kwargs["metrics"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = checkpoint_folder(args, state)
        self.save_part(folder)
        _TRAININGS[id(state)].checkpoints.complete(self.name, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        data = self._drawn_rows(kwargs)
        if data is not None and data.drawn_by == self.name:
            data.drawn_by = None  # from now on `set_epoch` draws
        self.end(state)
        if recorder := self._last_recorder(state):
            recorder.end(args, state)

    def _note(self, what: str) -> None:
        self.notes.append(what)
        warnings.warn(what, stacklevel=4)

    def _drawn_rows(self, kwargs: Mapping[str, Any]) -> QualitySubset | None:
        """The rows that the epochs are drawn from."""
        if self.data is not None or kwargs.get("train_dataloader") is None:
            return self.data
        rows = kwargs["train_dataloader"].dataset
        return rows if isinstance(rows, QualitySubset) else None

    def _last_recorder(self, state: TrainerState) -> Recorder | None:
        """The training's Recorder, for the last of its callbacks: by then the others have had the event."""
        training = _TRAININGS.get(id(state))
        recorder = None if training is None else training.recorder
        return recorder if recorder is not None and recorder.parts[-1] is self else None


def _forget_absent(data: QualitySubset, present: list[str]) -> None:
    """Undo the draws of callbacks of an earlier training that this one lacks; scores set by `data.use` stay."""
    if data.plan.by is not None and data.plan.by not in present:
        data.plan, data.task = data.plan.unscored(), None
    if data.drawn_by not in present:
        data.drawn_by = None


def require_subset(data: Any, name: str) -> None:
    """Raises SettingsError for rows that callbacks cannot draw."""
    if not isinstance(data, QualitySubset):
        raise SettingsError(
            f"{name} got a {type(data).__name__}; it goes with a QualitySubset: make data = "
            "tsqlora.QualitySubset(rows), and give it to the Trainer too"
        )


def require_fresh_draws(args: TrainingArguments, loader: DataLoader[Any]) -> None:
    """Raises SettingsError for a loader of a QualitySubset that keeps an earlier draw or its rows' lengths.

    Its sampler is made once, from the first draw; the next one has other rows in the same places.
    """
    data: Any = loader.dataset
    if not isinstance(data, QualitySubset):
        return
    if args.dataloader_persistent_workers:
        raise SettingsError("dataloader_persistent_workers keeps an old draw; set it to False")
    batches = inner_batch_sampler(loader.batch_sampler)
    sampler = getattr(batches, "sampler", batches)
    if knows_lengths(sampler):
        raise SettingsError(
            f"{type(sampler).__name__} reads the rows' lengths once, and a QualitySubset has other rows in the next "
            "epoch; leave train_sampling_strategy out of the TrainingArguments, or set it to 'sequential' and let "
            "QualitySubset(rows, lengths=..., batch_size=...) group them"
        )
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
