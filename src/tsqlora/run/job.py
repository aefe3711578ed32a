"""What a run is made of: data and model, loaded and checked; the method's two halves; training and measuring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from tsqlora.adapter.init_from import start_from
from tsqlora.adapter.slots import active_parameters
from tsqlora.adapter.wrap import wrap
from tsqlora.data.generation import least_prompt
from tsqlora.data.labels import LabelMap
from tsqlora.data.packing import PackedCollator, packed_collator
from tsqlora.data.prepare import Prepared, prepare, resolve_max_length
from tsqlora.errors import SettingsError
from tsqlora.progress import Progress
from tsqlora.quality.asked import require_terms
from tsqlora.quality.sampling import stratum_sizes
from tsqlora.quality.subset import QualitySubset
from tsqlora.run.config import Config
from tsqlora.run.plan import plan, without_effect
from tsqlora.run.predict import Asking
from tsqlora.run.reading import read, require_of_task, writing_of
from tsqlora.run.start import start_notes, start_of
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.texts import require_text_metrics
from tsqlora.training.arguments import hardware_has_bf16, training_arguments
from tsqlora.training.collate import collate_of
from tsqlora.training.fit import Inputs, Method, fit
from tsqlora.training.load import Pretrained, load_pretrained
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import CHECKPOINT_DIR
from tsqlora.training.write import require_room

NOTHING_TO_SCORE = "quality.enabled is false: there is nothing to score; set it to true"


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, loaded and checked."""

    config: Config
    task: Task
    pretrained: Pretrained
    data: Prepared
    max_length: int

    @property
    def collate(self) -> Collate:
        return collate_of(self.task, self.pretrained.model, self.pretrained.tokenizer, max_length=self.max_length)

    @property
    def packed(self) -> PackedCollator | None:
        """The batches of training, where samples share rows."""
        if not self.config.data.packing:
            return None
        if not (isinstance(self.task, Generation) and self.task.causal):
            raise SettingsError(f"data.packing is for causal-lm, and the task is {self.task.name}; set it to false")
        return packed_collator(self.pretrained.tokenizer, max_length=self.max_length)


def arguments(config: Config, run: Path, *, micro_batch_size: int | None = None) -> TrainingArguments:
    """The Trainer's arguments; bfloat16 where the config says so, or else where the hardware has it.

    `micro_batch_size`: a device takes a batch in parts of so many rows, whose gradients are accumulated.
    """
    settings = config.training
    generates = isinstance(get_task(config.task.type), Generation)
    # Of a validation in mid-run no logits are kept: they are a vocabulary wide, for every token.
    further = ({"prediction_loss_only": True} if generates else {}) | settings.further_arguments()
    rows = micro_batch_size or settings.batch_size
    if rows < settings.batch_size:
        windows = int(further.get("gradient_accumulation_steps", 1))
        further["gradient_accumulation_steps"] = windows * settings.batch_size // rows
    return training_arguments(
        run / CHECKPOINT_DIR,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=rows,
        eval_batch_size=max(1, settings.eval_batch_size * rows // settings.batch_size),
        bf16=hardware_has_bf16() and not further.get("fp16") if settings.bf16 is None else settings.bf16,
        seed=settings.seed,
        further=further,
    )


def load(config: Config) -> Job:
    """Reads the data and the model, and checks that they fit together."""
    require_of_task(config)
    splits = read(config)
    pretrained, length = load_model(config, splits.labels)
    data = prepare(splits, pretrained.tokenizer, max_length=length, writing=writing_of(config))
    task = get_task(config.task.type)
    if (
        isinstance(task, Generation)
        and "test" in splits.sources
        and not (splits.format and splits.format.name == "text")
    ):
        require_text_metrics()
        shortest = least_prompt(pretrained.tokenizer) if task.causal else 1
        require_room(pretrained.positions, config.task.max_new_tokens, longest=shortest)
    return Job(config, task, pretrained, data, length)


def load_model(config: Config, labels: LabelMap | None) -> tuple[Pretrained, int]:
    """The pretrained model with a head for these classes, and how many tokens are kept of a sample."""
    base = config.model
    set_seed(config.training.seed)
    task = get_task(config.task.type)
    pretrained = load_pretrained(
        base.path,
        labels=labels,
        generation=task if isinstance(task, Generation) else None,
        revision=base.revision,
        dtype=base.dtype,
        quantization=base.quantization,
        trust_remote_code=base.trust_remote_code,
    )
    length = resolve_max_length(
        config.data.max_length, tokenizer_limit=pretrained.tokenizer.model_max_length, positions=pretrained.positions
    )
    target, positions = config.data.max_target_length, pretrained.positions
    if target is not None and positions is not None and target > positions:
        raise SettingsError(f"data.max_target_length {target} is above the model's {positions} positions; lower it")
    return pretrained, length


def begin(job: Job, args: TrainingArguments) -> tuple[PeftModel, RunRecord]:
    """The model with its rank slots, and the record of a run that begins."""
    model, seed = with_slots(job.config, job.pretrained), job.config.training.seed
    labels, samples = job.data.splits.labels, job.data.samples
    texts = {} if job.data.splits.format is None else {"format": job.data.splits.format.name}
    record = RunRecord(
        status="running",
        seed=seed,
        task=job.task.name,
        labels=None if labels is None else list(labels.names),
        data={"hash": job.data.hash, "max_length": job.max_length, "columns": job.data.columns(), **texts},
        plan=plan(job.config, model, samples, args),
        parameters={"trainable": active_parameters(model)},
    )
    record.notes += job.data.notes
    record.notes += start_notes(job.config, record.labels)
    for name, split in samples.items():
        if split.truncated:
            what = "prompts" if texts else "texts"
            record.notes.append(f"{split.truncated} of {len(split)} {name} {what} were cut to {job.max_length} tokens")
    if job.config.model.trust_remote_code:
        record.notes.append("code that came with the model was run: model.trust_remote_code was true")
    record.notes += without_effect(job.config)
    return model, record


def with_slots(config: Config, pretrained: Pretrained) -> PeftModel:
    """The pretrained model with LoRA at its first ranks, or at an adapter's; it is changed in place."""
    adapter, ranks = config.adapter, config.ranks
    set_seed(config.training.seed)
    common: dict[str, Any] = {
        "max_rank": ranks.resolved_max(),
        "dropout": adapter.dropout,
        "modules_to_save": pretrained.new_modules,
    }
    if (start := start_of(config)) is not None:
        model = start_from(pretrained.model, start, **common)
    else:
        model = wrap(
            pretrained.model,
            mean_rank=ranks.mean,
            alpha=adapter.alpha,
            target_modules=adapter.target_modules,
            **common,
        )
    for written in model.peft_config.values():
        written.revision = config.model.revision  # of the base, by which PEFT loads it
    return model


def method(
    job: Job, scores_path: Path, progress: Progress | None
) -> tuple[QualitySubset, QualityCallback | None, RankCallback]:
    """The method's two halves as the config sets them, and the rows that an epoch trains on."""
    q = job.config.quality
    data = subset(job, q.fraction)
    quality = quality_half(
        job,
        data,
        scores_path,
        progress,
        weights=q.resolved_weights(),
        temperature=q.resolved_temperature(),
        reject=q.resolved_reject(),
        guard=q.guard,
    )
    if q.enabled:
        require_drawable(job, quality)
    return data, quality if q.enabled else None, ranks_half(job)


def subset(job: Job, fraction: float) -> QualitySubset:
    """The training rows, of which an epoch sees this share."""
    samples, training = job.data.samples["train"], job.config.training
    return QualitySubset(
        samples,
        fraction,
        training.seed,
        resample=job.config.quality.resample,
        lengths=samples.lengths,
        batch_size=training.batch_size,
    )


def quality_half(
    job: Job,
    data: QualitySubset,
    scores_path: Path,
    progress: Progress | None,
    *,
    weights: Mapping[str, float] | None,
    temperature: float,
    reject: bool | None,
    guard: bool,
) -> QualityCallback:
    """Warm-up, scoring and draws as the config sets them, by this rule."""
    q = job.config.quality
    if q.reject and not isinstance(job.task, Classification):
        raise SettingsError(
            f"quality.reject finds wrong labels of classes, and the task is {job.task.name}; leave it out"
        )
    return QualityCallback(
        data,
        q.warmup,
        limit=q.warmup_limit,
        weights=weights,
        temperature=temperature,
        reject=reject,
        scope=q.scope,
        reference=q.reference,
        calibration=q.calibrate,
        guard=guard,
        seed=job.config.training.seed,
        hashes=job.data.samples["train"].hashes,
        ids=job.data.samples["train"].ids,
        about=about_rows(job.config, job.data),
        scores_path=scores_path,
        progress=progress,
        collate=job.collate,
    )


def require_drawable(job: Job, quality: QualityCallback) -> None:
    """Raises before the warm-up what would come after it: for terms and sizes that a softmax of Q cannot have."""
    if quality.weights is None:
        return
    require_terms(quality.weights, job.task)
    if isinstance(job.task, Classification):
        labels = job.data.samples["train"].labels
        stratum_sizes(np.unique(labels, return_counts=True)[1], len(quality.data))


def ranks_half(job: Job) -> RankCallback:
    """Ranks that follow sensitivity, as the config sets them."""
    config, r = job.config, job.config.ranks
    return RankCallback(
        r.interval,
        warmup=r.warmup,
        freeze=r.freeze,
        moves=r.moves,
        min_rank=r.min,
        gamma=r.gamma,
        policy=r.policy,
        estimator=r.estimator,
        samples=r.samples,
        seed=config.training.seed,
        collate=job.collate,
    )


def about_rows(config: Config, data: Prepared) -> dict[str, Any]:
    """For the scores' record: where the rows are, their columns, and what the labels' numbers mean."""
    labels = data.splits.labels
    return {
        "data": config.data.train,
        "columns": data.columns(),
        "classes": None if labels is None else list(labels.names),
        "format": None if data.splits.format is None else data.splits.format.name,
    }


def fit_job(
    job: Job,
    model: nn.Module,
    args: TrainingArguments,
    data: QualitySubset,
    record: RunRecord,
    quality: QualityCallback | None,
    ranks: RankCallback | None,
    progress: Progress | None,
    *,
    also: Sequence[TrainerCallback],
    resume_from: Path | None = None,
    run: Path | None = None,
) -> None:
    """Warm-up, scoring and training: one stock Trainer, one optimizer, one schedule."""
    fit(
        model,
        args,
        Method(data, quality, ranks),
        Inputs(job.task, job.pretrained.tokenizer, job.collate, job.data.samples["validation"], job.packed),
        record,
        also=also,
        resume_from=resume_from,
        progress=progress,
        run=run,
    )


def asking_of(job: Job, args: TrainingArguments) -> Asking:
    """How the run's model is asked."""
    return Asking(
        job.task,
        job.pretrained.tokenizer,
        job.max_length,
        args.per_device_eval_batch_size,
        torch.bfloat16 if args.bf16 else None,
        job.config.task.max_new_tokens,
        job.config.task.beams,
        job.pretrained.positions,
    )


def measure(job: Job, model: nn.Module, record: RunRecord, args: TrainingArguments, progress: Progress | None) -> None:
    """Metrics of validation and test, into the record; of generated text, what is written on the test rows."""
    asking, splits = asking_of(job, args), job.data.splits
    for split in ("validation", "test"):
        if split not in job.data.samples:
            continue
        samples = job.data.samples[split]
        with record.timed("evaluation") as cost:
            record.metrics[split] = asking.metrics(model, samples.samples, phase=split, progress=progress)
            if split == "test" and splits.format is not None:
                record.metrics[split] |= asking.text_metrics(
                    model, splits.rows(split), splits.format, progress=progress
                )
        cost.add(forward=len(samples), tokens=sum(samples.lengths))
