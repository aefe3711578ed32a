"""run.json of one training: our callbacks' decisions, costs, and the Trainer's log."""

import math
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import has_length

from tsqlora import distributed
from tsqlora.adapter.slots import active_parameters, active_ranks, has_slots
from tsqlora.compat.transformers import saved_note
from tsqlora.errors import DataError, UnsupportedError
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import task_of
from tsqlora.tasks.forward import base_model
from tsqlora.training.checkpoints import NOTE, epoch_of
from tsqlora.training.record import RunRecord

PHASES = ("look", "trusted model", "ranks", "training")
"""In the order in which they begin."""
EVERY = 3.0
"""Seconds between two writings of run.json."""
SHARE = 0.02
"""Of a run's time that writing it may take."""
MOST_ENTRIES = 5000
_EVALUATION = "eval_"


@runtime_checkable  # for beartype, which checks annotations while tests run
class Part(Protocol):
    """A callback whose decisions belong in the record."""

    @property
    def spent(self) -> Mapping[str, PhaseCost]:
        """Cost of each of its phases until now."""
        ...

    def summary(self) -> Mapping[str, Any]:
        """Current fields of RunRecord; `notes` and `settings` are added to those of other parts."""
        ...


class Recorder:
    """Keep a training's record, and with a folder its run.json, up to date every few seconds.

    The callbacks of a training share one, and the last of them calls it (`PartCallback`). `tsqlora train` makes it
    and writes the finished record itself; in any other Trainer the first callback makes it.
    """

    def __init__(self, record: RunRecord, data: Any, folder: Path | None, *, finishes: bool = False) -> None:
        self.record, self.data, self.folder = record, data, folder
        self.finishes = finishes
        """Whether the record is complete when training ends; `tsqlora train` measures afterwards."""
        self._notes = [*record.notes]
        self._parts: list[weakref.ref[Part]] = []
        self._since: float | None = None
        self._elsewhere = self._due = 0.0
        self._epoch = -1

    def begin(self, state: TrainerState) -> None:
        """Begin a training, with the cost until the checkpoint that it resumes from."""
        self._parts = []
        if state.global_step > 0 and (cost := saved_note(state, NOTE).get("cost")) is not None:
            self.record.cost["training"] = PhaseCost(**cost)

    def add(self, part: Part) -> None:
        """Add a part, in the order of the Trainer's events."""
        # The Trainer has the callbacks: one that is taken out of it, or failed, lets go of the model.
        self._parts.append(weakref.ref(part))

    @property
    def parts(self) -> list[Part]:
        return [part for reference in self._parts if (part := reference()) is not None]

    def begin_step(self, state: TrainerState) -> None:
        """Start the clock; between two epochs lie evaluations, saves and looks."""
        if self._since is None or self._epoch != epoch_of(state):
            self._epoch, self._since, self._elsewhere = epoch_of(state), time.perf_counter(), self._seconds_of_parts()

    def end_step(self, args: TrainingArguments, state: TrainerState) -> None:
        """Add the step's cost, and write run.json if it is time."""
        now, elsewhere = time.perf_counter(), self._seconds_of_parts()
        rows, tokens = passed(self.data, args, state)
        cost = self.record.phase("training")
        since = now if self._since is None else self._since
        cost.add(seconds=now - since - (elsewhere - self._elsewhere), forward=rows, backward=rows, tokens=tokens)
        self._since, self._elsewhere = now, elsewhere
        saved_note(state, NOTE)["cost"] = asdict(cost)
        if state.is_world_process_zero and self.folder is not None and now >= self._due:
            self.fill(state).now = {"phase": "training", "step": state.global_step, "time": round(time.time())}
            self.save()
            took = time.perf_counter() - now
            self._due = now + took + max(EVERY, took / SHARE)

    def end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Record the training's end, and with `finishes` write run.json."""
        self.fill(state).now = {}
        if self.finishes and state.is_world_process_zero:
            self.record.status = "finished"
            self._measured(_evaluated(args, state))

    def evaluated(self, state: TrainerState, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation after training; earlier ones are in the history."""
        if self.record.status == "finished" and state.is_world_process_zero:
            self._measured(metrics)

    def _measured(self, logs: Mapping[str, Any]) -> None:
        if metrics := metrics_of(logs):
            self.record.metrics["validation"] = metrics
        self.save()

    def fill(self, state: TrainerState) -> RunRecord:
        """The record with the current values."""
        record, summaries = self.record, [dict(part.summary()) for part in self.parts]
        record.notes = [*self._notes, *(note for summary in summaries for note in summary.pop("notes", ()))]
        for summary in summaries:
            settings = summary.pop("settings", {})
            if record.settings:
                record.settings |= settings
            for name, value in summary.items():
                setattr(record, name, value)
        spent = record.cost | {phase: cost for part in self.parts for phase, cost in part.spent.items()}
        order = [*PHASES, *(phase for phase in spent if phase not in PHASES)]
        record.cost = {phase: spent[phase] for phase in order if phase in spent}
        record.history = logged(state.log_history)
        return record

    def save(self) -> None:
        """Write run.json, if there is a folder for it."""
        if self.folder is None:
            return
        try:
            self.record.save(self.folder)
        except OSError as error:
            if not self.finishes:
                raise
            # The trained model is worth more than its record: the user's next line saves it.
            warnings.warn(f"{self.folder}: run.json cannot be written ({error.strerror}); no report", stacklevel=2)
            self.folder = None

    def _seconds_of_parts(self) -> float:
        return sum(cost.seconds for part in self.parts for cost in part.spent.values())


def of_draws(data: Any) -> dict[str, Any]:
    """The record's `quality` without a QualityCallback."""
    drawn: dict[str, Any] = {"enabled": False, "used": False}
    if isinstance(data, QualitySubset):
        drawn |= {"fraction": data.plan.fraction, "rows_an_epoch": len(data), "trusted_rows": len(data.trusted)}
        drawn["trusted_from"] = data.plan.trusted_from
    return drawn


def passed(data: Any, args: TrainingArguments, state: TrainerState) -> tuple[int, int]:
    """Rows of the last step, of every process, and their tokens: 0 if lengths are unknown."""
    if isinstance(data, QualitySubset):
        rows = rows_of_step(data, args, state)
        return len(rows), 0 if data.lengths is None else sum(data.lengths[row] for row in rows)
    size = step_size(args, state)
    if not has_length(data):
        return size, 0
    rows = _rows_of_epoch(len(data), args, state)
    begun = (state.global_step - 1) % max(1, -(-rows // size)) * size
    return min(size, rows - begun), 0


def rows_of_step(data: QualitySubset, args: TrainingArguments, state: TrainerState) -> Sequence[int]:
    """The rows of the last step, of every process."""
    size, rows = step_size(args, state), _rows_of_epoch(len(data), args, state)
    place = (state.global_step - 1) % max(1, -(-rows // size))
    return data.indices[:rows][place * size : (place + 1) * size].tolist()


def _rows_of_epoch(rows: int, args: TrainingArguments, state: TrainerState) -> int:
    """The rows of an epoch that are trained on: dataloader_drop_last leaves out an incomplete batch."""
    batch = step_size(args, state) // args.gradient_accumulation_steps
    return rows - rows % batch if args.dataloader_drop_last else rows


def step_size(args: TrainingArguments, state: TrainerState) -> int:
    """Rows of an optimizer step, of every process."""
    lowered = state.train_batch_size if args.auto_find_batch_size else None
    processes = 1 if cast(AcceleratorConfig, args.accelerator_config).split_batches else args.world_size
    return (lowered or args.train_batch_size) * args.gradient_accumulation_steps * processes


def logged(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A Trainer's log for the record, without its speed; of many losses every n-th.

    Only finite numbers: JSON has no others, and GuardCallback names such steps.
    """
    entries = [
        {name: value for name, value in entry.items() if not _of_speed(name) and _is_finite(value)} for entry in history
    ]
    rows = [entry for entry in entries if entry.keys() - {"step", "epoch"} and "train_loss" not in entry]
    every = -(-len(rows) // MOST_ENTRIES)
    return [entry for j, entry in enumerate(rows) if j % every == 0 or "loss" not in entry]


def _of_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def metrics_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation by their plain names, the loss last.

    >>> metrics_of({"eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 2.0, "epoch": 1.0})
    {'accuracy': 0.9, 'loss': 0.5}
    """
    names = [n for n, value in logs.items() if n.startswith(_EVALUATION) and not _of_speed(n) and _is_finite(value)]
    metrics = {name.removeprefix(_EVALUATION): float(logs[name]) for name in names}
    return dict(sorted(metrics.items(), key=lambda metric: metric[0] == "loss"))


def _evaluated(args: TrainingArguments, state: TrainerState) -> Mapping[str, Any]:
    """The log of the last evaluation, or of the best model that was loaded at the end."""
    logs = [entry for entry in state.log_history if metrics_of(entry)]
    best = state.best_global_step if args.load_best_model_at_end else None
    return next((entry for entry in logs if entry["step"] == best), logs[-1] if logs else {})


_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "weight_decay", "optim", "bf16", "fp16", "seed", "world_size",
)  # fmt: skip
"""The Trainer's arguments in the record."""


def own_recorder(args: TrainingArguments, state: TrainerState, model: nn.Module, data: Any) -> Recorder:
    """The Recorder of a training in a user's Trainer, which writes run.json into its output_dir."""
    model = distributed.unwrapped(model)
    plan: dict[str, Any] = {"steps": state.max_steps, "ranks": active_ranks(model) if has_slots(model) else {}}
    rows = "a stream"
    if has_length(data):
        pool = len(data.dataset) if isinstance(data, QualitySubset) else len(data)
        rows = f"{pool:,} rows"
        plan |= {"rows": {"train": pool}, "rows_an_epoch": len(data), "epochs": state.num_train_epochs}
    config = getattr(model, "config", None)
    record = RunRecord(
        status="running",
        seed=args.seed,
        task=_task_of(data, model, args),
        labels=None,
        data={},
        plan=plan,
        quality=of_draws(data),
        parameters={"trainable": active_parameters(model)},
        settings={
            "model": {"path": getattr(config, "name_or_path", "") or type(base_model(model)).__name__},
            "data": {"train": rows},
            "training": {name: _plain(getattr(args, name)) for name in _ARGUMENTS},
        },
    )
    return Recorder(record, data, Path(str(args.output_dir)), finishes=True)


def _task_of(data: Any, model: nn.Module, args: TrainingArguments) -> str:
    task = data.task if isinstance(data, QualitySubset) else None
    try:
        return (task or task_of(model, label_smoothing=args.label_smoothing_factor)).name
    except (DataError, UnsupportedError, TypeError):
        return type(model).__name__


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(getattr(value, "value", value))
