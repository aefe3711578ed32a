"""One training run in the stock Trainer: arguments, callbacks, and what each phase cost."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from tsqlora.data.tokenise import TokenisedSplit
from tsqlora.errors import SettingsError
from tsqlora.quality.score import Progress
from tsqlora.quality.subset import QualitySubset
from tsqlora.record import PhaseCost, RunRecord
from tsqlora.tasks import Task
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback


def hardware_has_bf16() -> bool:
    """Whether bfloat16 is computed by the GPU or processor itself: elsewhere it is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
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
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    }
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
            disable_tqdm=True,
            **(defaults | further),
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"training: {error}") from error


def fit(
    model: PeftModel,
    data: QualitySubset,
    args: TrainingArguments,
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    validation: TokenisedSplit,
    record: RunRecord,
    quality: QualityCallback | None,
    ranks: RankCallback | None,
    also: tuple[TrainerCallback, ...] = (),
    resume_from: Path | None = None,
    progress: Progress | None = None,
) -> Trainer:
    """Trains the model in place, and writes seconds, passes and tokens of each phase to the record."""
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=validation,  # type: ignore[arg-type]
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: task.metrics(p.predictions, p.label_ids),  # type: ignore[arg-type]
        callbacks=[
            *(callback for callback in (quality, ranks) if callback is not None),
            CostCallback(data, record, ranks, progress),
            *also,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    if quality is not None:
        record.cost["scoring"] = scoring_cost(quality)
    if ranks is not None and ranks.started:
        rows = min(ranks.samples, len(data))
        record.cost["ranks"] = PhaseCost(seconds=ranks.seconds, forward=rows, backward=rows)
    return trainer


def scoring_cost(quality: QualityCallback) -> PhaseCost:
    """What scoring took, tests of a model still at chance included.

    The reference is passed forward twice (calibration, gradients) and backward once; every
    row forward and backward once, and forward again where terms look ahead.
    """
    cost = PhaseCost(seconds=quality.seconds, forward=len(quality.attempts) * quality.reference)
    scores = quality.data.scores
    if scores is not None:
        rows, reference = len(scores), int(scores.record["reference_rows"])
        looks_ahead = any(term.lookahead for term in quality.terms.values())
        cost.add(forward=rows * (2 if looks_ahead else 1) + 2 * reference, backward=rows + reference)
    return cost


class CostCallback(TrainerCallback):
    """Adds up what warm-up and training cost, epoch by epoch, and reports progress.

    It must come after RankCallback, whose first probe is no part of an epoch's training.
    """

    def __init__(
        self, data: QualitySubset, record: RunRecord, ranks: RankCallback | None, progress: Progress | None
    ) -> None:
        self.data, self.record, self.ranks, self.progress = data, record, ranks, progress
        self.started: float | None = None
        self.rank_seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.started is None:
            self.rank_seconds = self._rank_seconds()
            self.started = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress(self._phase(), state.global_step, state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.started is None:
            return
        rows = len(self.data)
        tokens = sum(self.data.lengths[row] for row in self.data.indices) if self.data.lengths else 0
        seconds = perf_counter() - self.started - (self._rank_seconds() - self.rank_seconds)
        self.record.phase(self._phase()).add(seconds=seconds, forward=rows, backward=rows, tokens=tokens)
        self.started = None

    def _phase(self) -> str:
        return "warm-up" if self.data.awaits_scores else "training"

    def _rank_seconds(self) -> float:
        return 0.0 if self.ranks is None else self.ranks.seconds
