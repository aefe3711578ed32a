"""One training run in the stock Trainer: arguments, callbacks, and what each phase cost."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tsqlora.compat.transformers import installed_reporters, reporter_kinds, set_loss_scaling, summed_batches
from tsqlora.data.packing import PackedCollator
from tsqlora.data.samples import TokenisedSplit
from tsqlora.errors import SettingsError
from tsqlora.files import write_json
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.layer_sensitivity import sensitivity_rows
from tsqlora.progress import Progress
from tsqlora.quality.rows import reference_indices
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.training.checkpoints import register_part, saving_part
from tsqlora.training.drawing import EPOCH_ERROR
from tsqlora.training.live import KeepRecord, TellProgress
from tsqlora.training.nonfinite import GuardCallback
from tsqlora.training.packed import require_packing
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import PhaseCost, RunRecord
from tsqlora.training.report_callback import ReportCallback

COST_FILE = "tsqlora_cost.json"
PHASES = ("warm-up", "scoring", "ranks", "training")
"""In the order in which they begin."""
_REPORTERS = {"mlflow", "tensorboard", "wandb"}
"""Packages of the reporters that are known to be asked for by name."""


def hardware_has_bf16() -> bool:
    """Whether bfloat16 is computed by the GPU or processor itself: elsewhere it is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def training_arguments(
    output_dir: Path,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    eval_batch_size: int,
    bf16: bool,
    seed: int,
    further: dict[str, Any],
) -> TrainingArguments:
    """TrainingArguments as the method needs them; `further` fields are taken as they are.

    Rows come in the order of the draw, which holds batches of like length already.
    """
    defaults: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 10,
        "disable_tqdm": True,
        # On, the Trainer multiplies a loss by the number of processes that BERT's, being a mean, is not divided by.
        "average_tokens_across_devices": False,
        # Not on Apple's MPS, which has no float64; `use_cpu: false` tries it all the same.
        "use_cpu": not torch.cuda.is_available(),
    }
    _require_reporters(further.get("report_to") or "none")
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=eval_batch_size,
            bf16=bf16,
            seed=seed,
            data_seed=seed,
            train_sampling_strategy="sequential",
            **(defaults | further),
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"training: {error}") from error


def _require_reporters(named: str | list[str]) -> None:
    """Raises SettingsError for a reporter that is unknown or not installed, before anything is loaded."""
    try:
        reporter_kinds(named)
    except ValueError as error:
        raise SettingsError(f"training.report_to: {error}") from None
    names = {named} if isinstance(named, str) else {*named}
    for name in sorted(names & _REPORTERS - installed_reporters()):
        raise SettingsError(f"training.report_to: {name} is not installed; install it with: pip install {name}")


@runtime_checkable
class AddsToLoss(Protocol):
    """A callback that adds a term to the loss of every batch, and must know how many batches a step sums."""

    def told_of_sums(self, summed: Callable[[], int]) -> None:
        """`summed` gives their number once the step has begun; 1 where its gradient is that of their mean."""
        ...


def fit(
    model: nn.Module,
    data: QualitySubset,
    args: TrainingArguments,
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    collate: Collate,
    packed: PackedCollator | None = None,
    validation: TokenisedSplit,
    record: RunRecord,
    quality: QualityCallback | None,
    ranks: RankCallback | None,
    also: tuple[TrainerCallback, ...] = (),
    resume_from: Path | None = None,
    progress: Progress | None = None,
    run: Path | None = None,
) -> Trainer:
    """Trains the model in place, and writes what each phase cost, and steps that were skipped, to the record.

    `packed` makes the batches of training and of validations in mid-run, where samples share rows. In the directory
    `run`, where one is given, run.json is kept as the run is now.
    """
    # A packed batch does not say how many samples it has.
    guard = GuardCallback(data if packed is None else None, ids=getattr(data.dataset, "ids", None))
    cost = CostCallback(data, record, quality, ranks, task)
    live: list[TrainerCallback] = []
    if progress is not None:
        live.append(TellProgress(data, ranks, progress, cost.place))
    if run is not None:
        live.append(KeepRecord(run, lambda state: so_far(record, state, cost)))
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=validation,  # type: ignore[arg-type]
        processing_class=tokenizer,
        data_collator=cast(Any, collate if packed is None else packed),
        # Beside logits an encoder-decoder shows its hidden states, of every row that is evaluated.
        preprocess_logits_for_metrics=lambda shown, _: shown[0] if isinstance(shown, tuple) else shown,
        compute_metrics=(lambda p: task.metrics(p.predictions, p.label_ids)) if isinstance(task, Answers) else None,  # type: ignore[arg-type]
        callbacks=[
            *(callback for callback in (quality, ranks) if callback is not None),
            *also,
            guard,
            cost,
            *live,
        ],
    )
    if packed is not None:
        require_packing(model, packed, data.dataset[0])  # where the Trainer has put the model
    # Both print what is logged on stdout, which is a command's result alone.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if args.report_to:
        trainer.add_callback(ReportCallback(trainer))
    divides = isinstance(task, Generation) and _divides_by_window(model, collate([data.dataset[0]]))
    set_loss_scaling(trainer, divides_by_window=divides)
    for callback in also:
        if isinstance(callback, AddsToLoss):
            callback.told_of_sums(partial(summed_batches, trainer))
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    record.cost = cost.of_all()
    record.skipped = guard.to_dict()
    record.notes += guard.notes()
    record.history = logged(trainer.state.log_history)
    return trainer


@torch.no_grad()
def _divides_by_window(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's own loss is the sum over tokens, divided by the number that the Trainer says.

    Llama's and GPT-2's is; T5's and BART's takes the number and is the mean over the batch all the same.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    many = torch.tensor(10**6, device=device)
    with eval_mode(model):
        mean, divided = (float(model(**inputs, **more).loss) for more in ({}, {"num_items_in_batch": many}))
    return abs(divided - mean) > 0.1 * abs(mean)


def so_far(record: RunRecord, state: TrainerState, cost: "CostCallback") -> RunRecord:
    """The record of a run as it is at a step."""
    phase, _, _ = cost.place(state)
    ranks = cost.ranks
    return replace(
        record,
        now={"phase": phase, "step": state.global_step, "time": round(time())},
        cost=cost.of_all(),
        history=logged(state.log_history),
        quality=what_quality_did(cost.quality, cost.data),
        rank_events=[] if ranks is None else list(ranks.events),
        ranks={} if ranks is None or ranks.loop is None else ranks.loop.ranks,
    )


def what_quality_did(quality: QualityCallback | None, data: QualitySubset) -> dict[str, Any]:
    """For the record: whether rows were drawn by quality, and if not, why."""
    drawn = {"fraction": data.plan.fraction, "rows_an_epoch": len(data)}
    if quality is None:
        return {"enabled": False, "used": False, **drawn}
    told = {"enabled": True, "used": data.scores is not None, **drawn, "attempts": quality.attempts}
    if data.scores is None:
        return told | {"refused": quality.refused}
    return told | {"scores": dict(data.scores.record)}


MOST_ENTRIES = 5000


def logged(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """A Trainer's log for the record, without what it says of its own speed; of many losses every so many-th.

    Numbers that are not finite, which JSON has not, are left out: GuardCallback tells of such steps.
    """
    entries = [
        {name: value for name, value in entry.items() if not _of_speed(name) and math.isfinite(value)}
        for entry in history
    ]
    told = [entry for entry in entries if entry.keys() - {"step", "epoch"} and "train_loss" not in entry]
    every = -(-len(told) // MOST_ENTRIES)
    return [entry for j, entry in enumerate(told) if j % every == 0 or "loss" not in entry]


def _of_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def scoring_cost(quality: QualityCallback, task: Task) -> PhaseCost:
    """What scoring took, tests of a model still at chance included.

    The reference is passed forward for calibration, and every row forward. Where a term needs
    gradients both go backward too, the reference in a pass of its own; where terms look ahead, rows go
    forward again.
    """
    data, scores = quality.data, quality.data.scores
    reference = reference_indices(len(data.dataset), quality.reference, quality.seed)
    gradients = any(term.gradient for term in quality.terms.values())
    tests = len(quality.attempts) + quality.scorings * (2 if gradients else 1)
    if isinstance(task, Generation):
        # Each test is against the model as it was before its adapter learned.
        tests += len(quality.attempts) + quality.scorings
    cost = PhaseCost(quality.seconds, forward=tests * len(reference), tokens=tests * tokens_of(data, reference))
    if scores is not None:
        rows = range(len(scores))
        terms = quality.terms.values()
        passes = 1 + any(term.lookahead for term in terms) + any(term.alone for term in terms)
        cost.add(
            forward=quality.scorings * passes * len(rows),
            backward=quality.scorings * (len(rows) + len(reference)) if gradients else 0,
            tokens=quality.scorings * passes * tokens_of(data, rows),
        )
    return cost


def ranks_cost(ranks: RankCallback, data: QualitySubset) -> PhaseCost:
    """What the first ranks took: a pass over rows of the first quality draw."""
    chosen = sensitivity_rows(len(data), ranks.samples, ranks.seed)
    tokens = tokens_of(data, data.draw(data.plan.scored_epoch)[chosen])
    return PhaseCost(ranks.seconds, forward=len(chosen), backward=len(chosen), tokens=tokens)


def tokens_of(data: QualitySubset, rows: Iterable[int]) -> int:
    """Tokens of these rows of all that there are; 0 if the lengths are not known."""
    return 0 if data.lengths is None else sum(data.lengths[row] for row in rows)


class CostCallback(TrainerCallback):
    """Adds up what warm-up and training cost, epoch by epoch.

    It must come after RankCallback, whose first probe is no part of an epoch's training.
    """

    def __init__(
        self,
        data: QualitySubset,
        record: RunRecord,
        quality: QualityCallback | None,
        ranks: RankCallback | None,
        task: Task,
    ) -> None:
        self.data, self.record, self.quality, self.ranks, self.task = data, record, quality, ranks, task
        self.started: float | None = None
        self.rank_seconds = 0.0
        self.warmup_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = register_part(args, state, "cost")
        if resumed is not None:
            saved = json.loads((resumed / COST_FILE).read_text())
            self.record.cost |= {phase: PhaseCost(**cost) for phase, cost in saved["cost"].items()}
            self.warmup_steps = saved["warmup_steps"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.started is None:
            self.rank_seconds = self._rank_seconds()
            self.started = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.data.plan.awaits_scores:
            self.warmup_steps = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_epoch(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A save at an epoch's last step comes before its end, which a run that is resumed from there never sees.
        if abs((state.epoch or 0) - round(state.epoch or 0)) < EPOCH_ERROR:
            self._end_epoch(state)
        elif self.started is not None:
            self._add_seconds(self.started)
        with saving_part(args, state, "cost") as folder:
            if state.is_world_process_zero:
                cost = {phase: asdict(cost) for phase, cost in self.record.cost.items()}
                write_json(folder / COST_FILE, {"cost": cost, "warmup_steps": self.warmup_steps})

    def place(self, state: TrainerState) -> tuple[str, int, int]:
        """The phase that a step is of, its steps that are done and its steps in all."""
        return self._phase(), *self._steps(state)

    def of_all(self) -> dict[str, PhaseCost]:
        """What every phase has cost until now, in their order; passes of the epochs that have ended."""
        if self.started is not None:
            self._add_seconds(self.started)
        found = dict(self.record.cost)
        if self.quality is not None:
            found["scoring"] = scoring_cost(self.quality, self.task)
        if self.ranks is not None and self.ranks.started:
            found["ranks"] = ranks_cost(self.ranks, self.data)
        return {phase: found[phase] for phase in PHASES if phase in found}

    def _end_epoch(self, state: TrainerState) -> None:
        if self.started is None:
            return
        self._add_seconds(self.started)
        self.started = None
        # The last epoch ends early where max_steps does not fill it.
        share = ((state.epoch or 0) - EPOCH_ERROR) % 1 + EPOCH_ERROR
        rows = round(share * len(self.data))
        tokens = tokens_of(self.data, self.data.indices[:rows])
        self.record.phase(self._phase()).add(forward=rows, backward=rows, tokens=tokens)

    def _add_seconds(self, since: float) -> None:
        """The time since then, but for what ranks took of it."""
        now, rank_seconds = perf_counter(), self._rank_seconds()
        self.record.phase(self._phase()).add(seconds=now - since - (rank_seconds - self.rank_seconds))
        self.started, self.rank_seconds = now, rank_seconds

    def _phase(self) -> str:
        return "warm-up" if self.data.plan.awaits_scores else "training"

    def _steps(self, state: TrainerState) -> tuple[int, int]:
        """Steps of the phase that are done, and its steps in all; a warm-up may turn out longer."""
        if not self.data.plan.awaits_scores:
            return state.global_step - self.warmup_steps, state.max_steps - self.warmup_steps
        epoch_steps = state.max_steps // state.num_train_epochs
        expected = 0 if self.quality is None else self.quality.warmup_epochs * epoch_steps
        return state.global_step, max(expected, -(-state.global_step // epoch_steps) * epoch_steps)

    def _rank_seconds(self) -> float:
        return 0.0 if self.ranks is None else self.ranks.seconds
