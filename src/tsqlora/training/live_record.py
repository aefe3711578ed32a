"""run.json of a training in a stock Trainer, up to date while it trains, by the Trainer's steps and epochs."""

import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from tsqlora import distributed
from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.errors import DataError, UnsupportedError
from tsqlora.libs.transformers import live_note
from tsqlora.model.request import ScoringRule
from tsqlora.record import PhaseCost, RunRecord, logged, metrics_of
from tsqlora.tasks import Task, task_of
from tsqlora.tasks.forward import base_model
from tsqlora.training.lora import active_ranks, trainable_parameters

PHASES = ("look", "ranks", "training")
"""In the order in which they begin."""
EVERY = 3.0
"""Seconds between two writings of run.json."""
SHARE = 0.02
"""Of a run's time that writing it may take."""

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


def half_precision(args: TrainingArguments, rule: ScoringRule) -> torch.dtype | None:
    """The precision of training in which a look measures too; None for float32, which terms that look ahead need."""
    if any(term.lookahead for term in rule.measured().values()):
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


class LiveRecord:
    """A training's record, of which the callback that draws the rows has a part, and other callbacks theirs.

    Args:
        folder: of run.json; None: it is not written.
        finishes: whether the record is complete when training ends; `tsqlora train` measures afterwards.
    """

    def __init__(self, record: RunRecord, folder: Path | None, *, finishes: bool) -> None:
        self.record, self.folder, self.finishes = record, folder, finishes
        self.notes = [*record.notes]
        self._since: float | None = None
        self._elsewhere = self._due = 0.0
        self._epoch = -1

    def begin_step(self, state: TrainerState) -> None:
        """Start the clock; between two epochs lie evaluations, saves and looks."""
        if self._since is None or self._epoch != epoch_of(state):
            self._epoch, self._since, self._elsewhere = epoch_of(state), time.perf_counter(), self._seconds(state)

    def end_step(self, args: TrainingArguments, state: TrainerState, data: QualitySubset) -> bool:
        """Add the step's cost; return whether it is time to write run.json."""
        now, elsewhere = time.perf_counter(), self._seconds(state)
        # The rows of the last step, of every process, and their tokens: 0 if lengths are unknown.
        size = step_size(args, state)
        batch = size // args.gradient_accumulation_steps
        whole = len(data) - len(data) % batch if args.dataloader_drop_last else len(data)
        begun = (state.global_step - 1) % max(1, -(-whole // size)) * size
        places = data.indices[begun : min(begun + size, whole)]
        tokens = 0 if data.lengths is None else sum(data.lengths[row] for row in places.tolist())
        seconds = now - (self._since or now) - (elsewhere - self._elsewhere)
        self.record.phase("training").add(seconds=seconds, forward=len(places), backward=len(places), tokens=tokens)
        self._since, self._elsewhere = now, elsewhere
        return state.is_world_process_zero and self.folder is not None and now >= self._due

    def write_now(self, state: TrainerState, own: dict[str, Any]) -> None:
        """Write the record of a training at this step, with the callback's `own` fields."""
        begun = time.perf_counter()
        self.fill(state, own)
        self.record.now = {"phase": "training", "step": state.global_step, "time": round(time.time())}
        self.write()
        now = time.perf_counter()
        self._due = now + max(EVERY, (now - begun) / SHARE)

    def fill(self, state: TrainerState, own: dict[str, Any]) -> None:
        """Bring all fields up to date."""
        record, others = self.record, live_note(state).get("record", {})
        record.notes = [*self.notes, *own["notes"], *others.get("notes", ())]
        if record.settings:
            record.settings |= own["settings"] | others.get("settings", {})
        for name, value in (own | others).items():
            if name not in ("notes", "settings", "cost"):
                setattr(record, name, value)
        spent = record.cost | others.get("cost", {})
        record.cost = {phase: spent[phase] for phase in dict.fromkeys((*PHASES, *spent)) if phase in spent}
        record.history = logged(state.log_history)

    def end(self, args: TrainingArguments, state: TrainerState, model: nn.Module, own: dict[str, Any]) -> None:
        """Record the end of a training of this model, which may be that of the best checkpoint by now."""
        self.fill(state, own)
        self.record.ranks = active_ranks(distributed.unwrapped(model))
        self.record.now = {}
        if not (self.finishes and state.is_world_process_zero):
            return
        self.record.status = "finished"
        logs = [entry for entry in state.log_history if metrics_of(entry)]
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        if logs:  # the last evaluation, or that of the best model, which was loaded
            shown = next((entry for entry in logs if entry["step"] == best), logs[-1])
            self.record.metrics["validation"] = metrics_of(shown)
        self.write()

    def evaluated(self, state: TrainerState, metrics: dict[str, Any]) -> None:
        """Record an evaluation after training; earlier ones are in the history."""
        if self.record.status == "finished" and state.is_world_process_zero:
            self.record.metrics["validation"] = metrics_of(metrics) or self.record.metrics.get("validation", {})
            self.write()

    def write(self) -> None:
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

    def _seconds(self, state: TrainerState) -> float:
        """Seconds of all phases but training."""
        costs: dict[str, PhaseCost] = self.record.cost | live_note(state).get("record", {}).get("cost", {})
        return sum(cost.seconds for phase, cost in costs.items() if phase != "training")


_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "weight_decay", "optim", "bf16", "fp16", "seed", "world_size",
)  # fmt: skip
"""The Trainer's arguments in the record."""


def own_record(
    args: TrainingArguments, state: TrainerState, model: nn.Module, data: QualitySubset, task: Task | None
) -> RunRecord:
    """The record of a training in a user's Trainer."""
    model, pool = distributed.unwrapped(model), len(data.dataset)
    plan = {"steps": state.max_steps, "ranks": active_ranks(model)}
    plan |= {"rows": {"train": pool}, "rows_an_epoch": len(data), "epochs": state.num_train_epochs}
    try:
        name = (task or task_of(model, label_smoothing=args.label_smoothing_factor)).name
    except (DataError, UnsupportedError, TypeError):
        name = type(model).__name__
    values = {name: getattr(args, name) for name in _ARGUMENTS}
    path = getattr(getattr(model, "config", None), "name_or_path", "") or type(base_model(model)).__name__
    training = {
        name: value if isinstance(value, int | float) else str(getattr(value, "value", value))
        for name, value in values.items()
    }
    return RunRecord(
        status="running",
        seed=args.seed,
        task=name,
        labels=None,
        data={},
        plan=plan,
        parameters={"trainable": trainable_parameters(model)},
        settings={"model": {"path": path}, "data": {"train": f"{pool:,} rows"}, "training": training},
    )
