"""One training of a stock Trainer by our callbacks: what they share, and the base class that shares it.

The Trainer's state, of which each training has a new one, carries the Session. The first callback that has an event
runs it for all of them, so that what they share happens once, whichever callbacks there are and in whichever order.
"""

import math
import time
import uuid
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from tsqlora import distributed
from tsqlora.compat.accelerate import inner_batch_sampler
from tsqlora.compat.transformers import carried, knows_lengths, live_note, saved_note
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import task_of
from tsqlora.tasks.forward import base_model
from tsqlora.training.checkpoints import (
    NOTE,
    checkpoint_folder,
    complete,
    require_resumable,
    require_resumable_saves,
    set_aside,
)
from tsqlora.training.lora import active_ranks, trainable_parameters
from tsqlora.training.record import RunRecord, logged, metrics_of
from tsqlora.training.steps import EPOCH_ERROR, epoch_of, passed

PHASES = ("look", "ranks", "training")
"""In the order in which they begin."""
EVERY = 3.0
"""Seconds between two writings of run.json."""
SHARE = 0.02
"""Of a run's time that writing it may take."""


class Session:
    """One training of a Trainer: the callbacks with a part in it, its draws, its checkpoints, and its record.

    Where it is resumed, its checkpoint is checked first, and the best one if it is to be brought back. Later
    checkpoints in the folder are another training's, and are renamed once this one begins. run.json is written every
    few seconds.

    Raises TsqLoraError naming the file that is damaged, or the folder that is of another run; SettingsError where there
    would be times without a complete checkpoint.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState, data: Any) -> None:
        saves, note = require_resumable_saves(args), saved_note(state, NOTE)
        self.resumed = checkpoint_folder(args, state) if state.global_step > 0 else None
        """The checkpoint that the training resumes from."""
        if self.resumed is not None:
            require_resumable(args, self.resumed, note.get("run"))
        # Unique for each training, also where two resume from the same checkpoint.
        note |= {"run": uuid.uuid4().hex, "rows": args.per_device_train_batch_size}
        self._later = (Path(str(args.output_dir)), state.global_step) if saves and distributed.is_first() else None
        self.data = data
        self.drawn: QualitySubset | None = data if isinstance(data, QualitySubset) else None
        """The rows that epochs are drawn from."""
        self.event: tuple[Callable[..., None], int] | None = None
        """The one that the callbacks have now, and its step."""
        self.references: list[weakref.ref["PartCallback"]] = []
        """To the callbacks: the Trainer has them, and one that is taken out of it, or failed, lets go of the model."""
        self.record: RunRecord | None = None
        self.finishes = False
        """Whether the record is complete when training ends; `tsqlora train` measures afterwards."""
        self._since: float | None = None
        self._elsewhere = self._due = 0.0
        self._epoch = -1

    def __reduce__(self) -> Any:
        """A copy of the Trainer's state carries None: it is of no training."""
        return type(None), ()

    @property
    def parts(self) -> list["PartCallback"]:
        """In the order of the Trainer's events."""
        return [part for reference in self.references if (part := reference()) is not None]

    def keep(self, state: TrainerState, record: RunRecord, folder: Path | None) -> None:
        """Keep this record up to date, and run.json in the folder; a resumed one has the cost until the checkpoint."""
        self.record, self.folder, self.notes = record, folder, [*record.notes]
        if self.resumed is not None and (cost := saved_note(state, NOTE).get("cost")) is not None:
            record.cost["training"] = PhaseCost(**cost)

    def begin_epoch(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Draw the rows of an epoch, after the looks that decide them."""
        # Not on train begin: a callback that refuses to begin leaves the folder as it was.
        if self._later is not None:
            set_aside(self._later[0], after=self._later[1])
            self._later = None
        data, names = self.drawn, [part.name for part in self.parts]
        # Draws of an earlier training's callback that this one lacks are undone; scores set by `data.use` stay.
        if data is not None and data.plan.by is not None and data.plan.by not in names:
            data.plan, data.task = data.plan.unscored(), None
        for part in self.parts:
            part.begin_epoch(args, state, **kwargs)
        # accelerate tells a data set its epoch only in some cases.
        if data is not None:
            data.begin_epoch(epoch_of(state), names[0])

    def begin_step(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Start the clock; between two epochs lie evaluations, saves and looks."""
        for part in self.parts:
            part.begin_step(args, state, **kwargs)
        if self._since is None or self._epoch != epoch_of(state):
            self._epoch, self._since, self._elsewhere = epoch_of(state), time.perf_counter(), self._elsewhere_in(state)

    def end_step(self, args: TrainingArguments, state: TrainerState, **_: Any) -> None:
        """Add the step's cost, and write run.json if it is time."""
        for part in self.parts:
            part.end_step()
        assert self.record is not None
        now, elsewhere = time.perf_counter(), self._elsewhere_in(state)
        rows, tokens = passed(self.data, args, state)
        cost = self.record.phase("training")
        since = now if self._since is None else self._since
        cost.add(seconds=now - since - (elsewhere - self._elsewhere), forward=rows, backward=rows, tokens=tokens)
        self._since, self._elsewhere = now, elsewhere
        saved_note(state, NOTE)["cost"] = asdict(cost)
        if state.is_world_process_zero and self.folder is not None and now >= self._due:
            self.fill(state).now = {"phase": "training", "step": state.global_step, "time": round(time.time())}
            self.write()
            took = time.perf_counter() - now
            self._due = now + took + max(EVERY, took / SHARE)

    def save(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Write every part into the Trainer's checkpoint, and last of all its manifest."""
        folder = checkpoint_folder(args, state)
        for part in self.parts:
            part.begin_save(args, state, **kwargs)
        for part in self.parts:
            part.save_part(folder)
        if not args.save_only_model:
            complete(folder, also=live_note(state).get("files", ()))

    def evaluated(self, state: TrainerState, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation after training; earlier ones are in the history."""
        if self.record is not None and self.record.status == "finished" and state.is_world_process_zero:
            self.record.metrics["validation"] = metrics_of(metrics) or self.record.metrics.get("validation", {})
            self.write()

    def end(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """End every part; `QualitySubset.set_epoch` draws again. Record it, and write run.json."""
        if self.drawn is not None:
            self.drawn.drawn_by = None
        for part in self.parts:
            part.end(state)
        model = distributed.unwrapped(kwargs["model"])  # which may be that of the best checkpoint by now
        record = self.fill(state, ranks=active_ranks(model))
        record.now = {}
        if self.finishes and state.is_world_process_zero:
            record.status = "finished"
            logs = [entry for entry in state.log_history if metrics_of(entry)]
            best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
            if logs:  # the last evaluation, or that of the best model, which was loaded
                shown = next((entry for entry in logs if entry["step"] == best), logs[-1])
                record.metrics["validation"] = metrics_of(shown)
            self.write()

    def fill(self, state: TrainerState, **more: Any) -> RunRecord:
        """The record with the current values, those of other callbacks, and `more`."""
        others = dict(live_note(state).get("record", {}))
        spent = self._spent(state)
        others.pop("cost", None)
        record, summaries = self.record, [*(dict(part.summary()) for part in self.parts), others, more]
        assert record is not None
        record.notes = [*self.notes, *(note for summary in summaries for note in summary.pop("notes", ()))]
        for summary in summaries:
            settings = summary.pop("settings", {})
            if record.settings:
                record.settings |= settings
            for name, value in summary.items():
                setattr(record, name, value)
        spent = record.cost | spent
        order = [*PHASES, *(phase for phase in spent if phase not in PHASES)]
        record.cost = {phase: spent[phase] for phase in order if phase in spent}
        record.history = logged(state.log_history)
        return record

    def write(self) -> None:
        """Write run.json, if there is a folder for it."""
        if self.folder is None or self.record is None:
            return
        try:
            self.record.save(self.folder)
        except OSError as error:
            if not self.finishes:
                raise
            # The trained model is worth more than its record: the user's next line saves it.
            warnings.warn(f"{self.folder}: run.json cannot be written ({error.strerror}); no report", stacklevel=2)
            self.folder = None

    def _spent(self, state: TrainerState) -> dict[str, PhaseCost]:
        """Cost of phases beside training's own."""
        parts = {phase: cost for part in self.parts for phase, cost in part.spent.items()}
        return parts | live_note(state).get("record", {}).get("cost", {})

    def _elsewhere_in(self, state: TrainerState) -> float:
        return sum(cost.seconds for cost in self._spent(state).values())


def _shared(act: Callable[..., None]) -> Callable[..., None]:
    """An event of the Trainer that the first of its callbacks runs for all of them."""

    def event(self: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        session: Session | None = carried(state)
        if session is not None and session.event != (act, state.global_step):
            session.event = act, state.global_step
            act(session, args, state, control=control, **kwargs)

    return event


class PartCallback(TrainerCallback, ABC):
    """A callback with a part in a Session. It answers the Trainer's events; a callback fills in the other methods."""

    name: ClassVar[str]
    """The class's public name, for messages and draws."""
    data: QualitySubset | None = None
    """The Trainer's rows; None: those of its loader, if they are drawn."""
    notes: list[str]
    """Warnings, for the record."""
    into: tuple[RunRecord, Path | None] | None = None
    """The record of `tsqlora train` and the folder of its run.json; None: the Session makes one."""

    @abstractmethod
    def begin(self, args: TrainingArguments, state: TrainerState, resumed: Path | None, **kwargs: Any) -> None:
        """Begin a training, from the checkpoint `resumed` if there is one."""

    def begin_epoch(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Before the rows of an epoch are drawn."""

    def begin_step(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Before the first forward pass of a step."""

    def end_step(self) -> None:
        """After a step of the optimizer."""

    def begin_save(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Before any part is written into a checkpoint."""

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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        require_fresh_draws(args, kwargs["train_dataloader"])
        session: Session = carried(state, lambda: Session(args, state, kwargs["train_dataloader"].dataset))
        if self.name in [part.name for part in session.parts]:
            raise SettingsError(f"the Trainer has two {self.name}s; give it one of each kind at most")
        session.references.append(weakref.ref(self))
        session.drawn = session.drawn or self.data
        if session.drawn is not None and session.drawn.seed is None:
            session.drawn.plan = replace(session.drawn.plan, seed=args.seed)
        self.begin(args, state, session.resumed, **kwargs)
        if session.record is None:
            session.finishes = self.into is None
            into = self.into or (own_record(args, state, kwargs["model"], session.data), Path(str(args.output_dir)))
            session.keep(state, *into)

    on_epoch_begin = _shared(Session.begin_epoch)
    on_step_begin = _shared(Session.begin_step)
    on_step_end = _shared(Session.end_step)
    on_save = _shared(Session.save)
    on_train_end = _shared(Session.end)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if session := carried(state):
            session.evaluated(state, kwargs["metrics"])

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        session = carried(state)
        data = self.data if session is None else session.drawn
        # Its rows would count as handed out for training.
        if data is not None and data.drawn_by is not None and kwargs["eval_dataloader"].dataset is data:
            raise SettingsError(
                "eval_dataset is the QualitySubset that is trained on; to evaluate on training rows give "
                "another data set: torch.utils.data.Subset(rows, data.draw(0))"
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if session := carried(state):
            session.event = None  # a second save of the same step is another event
        if control.should_epoch_stop and not control.should_training_stop:
            # The Trainer counts on, but its state would be within this epoch, and the next one draw the same rows.
            state.epoch = float(math.ceil((state.epoch or 0) - EPOCH_ERROR))

    def _note(self, what: str) -> None:
        self.notes.append(what)
        warnings.warn(what, stacklevel=4)


def of_draws(data: Any) -> dict[str, Any]:
    """The record's `quality` without a QualityCallback."""
    drawn: dict[str, Any] = {"enabled": False, "used": False}
    if isinstance(data, QualitySubset):
        drawn |= {"fraction": data.plan.fraction, "rows_an_epoch": len(data), "trusted_rows": len(data.trusted)}
    return drawn


_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "weight_decay", "optim", "bf16", "fp16", "seed", "world_size",
)  # fmt: skip
"""The Trainer's arguments in the record."""


def own_record(args: TrainingArguments, state: TrainerState, model: nn.Module, data: Any) -> RunRecord:
    """The record of a training in a user's Trainer."""
    model = distributed.unwrapped(model)
    plan: dict[str, Any] = {"steps": state.max_steps, "ranks": active_ranks(model)}
    rows, task = "a stream", None
    if has_length(data):
        pool = len(data.dataset) if isinstance(data, QualitySubset) else len(data)
        rows = f"{pool:,} rows"
        plan |= {"rows": {"train": pool}, "rows_an_epoch": len(data), "epochs": state.num_train_epochs}
    try:
        task = data.task if isinstance(data, QualitySubset) else None
        name = (task or task_of(model, label_smoothing=args.label_smoothing_factor)).name
    except (DataError, UnsupportedError, TypeError):
        name = type(model).__name__
    values = {name: getattr(args, name) for name in _ARGUMENTS}
    return RunRecord(
        status="running",
        seed=args.seed,
        task=name,
        labels=None,
        data={},
        plan=plan,
        quality=of_draws(data),
        parameters={"trainable": trainable_parameters(model)},
        settings={
            "model": {
                "path": getattr(getattr(model, "config", None), "name_or_path", "") or type(base_model(model)).__name__
            },
            "data": {"train": rows},
            "training": {
                name: value if isinstance(value, int | float) else str(getattr(value, "value", value))
                for name, value in values.items()
            },
        },
    )


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
        raise SettingsError(
            f"the Trainer's sampler is a {type(sampler).__name__}, which fits the first draw only: a QualitySubset has "
            "other rows in the same places in the next epoch; leave the sampler out of get_train_dataloader, and to "
            "see some rows more often repeat them in the data set"
        )
