"""The method, top to bottom: data, model, warm-up, scores, ranks, training, adapter, record."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Subset
from transformers import (
    DataCollatorWithPadding,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from tsqlora.adapter.slots import active_parameters, adapter_config
from tsqlora.adapter.wrap import wrap
from tsqlora.config import Config, dump_config, load_config
from tsqlora.data.prepare import Prepared, prepare, read_data, resolve_max_length
from tsqlora.errors import NotLearnedError, SettingsError
from tsqlora.inference import Trained, measure_split, open_run
from tsqlora.plan import plan
from tsqlora.quality.score import PAPER_TERMS, Progress, reference_indices, score
from tsqlora.quality.scores import Scores, sample
from tsqlora.quality.subset import QualitySubset
from tsqlora.ranks.allocate import allocate
from tsqlora.record import RECORD_FILE, RunRecord
from tsqlora.probe import sensitivity
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.classification import Classification
from tsqlora.training.fit import fit, hardware_has_bf16, training_arguments
from tsqlora.training.load import Pretrained, load_pretrained
from tsqlora.training.quality_callback import SCORES_FILE, QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.run_dir import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    CONFIG_FILE,
    last_checkpoint,
    locked,
    require_free,
)


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, loaded and checked."""

    config: Config
    task: Task
    pretrained: Pretrained
    data: Prepared
    max_length: int

    @property
    def bf16(self) -> bool:
        """As the config says, or where the hardware computes in bfloat16."""
        asked = self.config.training.bf16
        return hardware_has_bf16() if asked is None else asked

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.bf16 else None

    @property
    def collate(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.pretrained.tokenizer)


def train(config: Config, run: Path, *, resume: bool = False, progress: Progress | None = None) -> RunRecord:
    """Trains as the config says, into a run directory; returns what its run.json says.

    With `resume` an unfinished run goes on from its last checkpoint, and a finished one is
    left as it is.  Raises SettingsError where the directory holds another run.
    """
    with locked(run):
        if not resume:
            require_free(run)
        elif (finished := _finished(run, config)) is not None:
            return finished
        job = load(config)
        model, record = begin(job)
        (run / CONFIG_FILE).write_text(dump_config(config))
        data, quality, ranks = method(job, run / SCORES_FILE, progress)
        run_training(job, model, data, record, quality, ranks, run, progress, resume_from=last_checkpoint(run))
        record.quality = what_quality_did(job, quality, data)
        record.rank_events, record.ranks = ranks.events, ranks.final
        model.save_pretrained(str(run / ADAPTER_DIR))
        for split in ("validation", "test"):
            if split in job.data.samples:
                with record.timed("evaluation") as cost:
                    samples = job.data.samples[split]
                    record.metrics[split] = measure_split(
                        model,
                        samples,
                        job.collate,
                        job.task,
                        batch_size=config.training.eval_batch_size,
                        autocast=job.autocast,
                        progress=progress,
                    )
                    cost.add(forward=len(samples), tokens=sum(samples.lengths))
        if quality is not None and quality.refused:
            record.notes.append(f"rows were drawn at random: {quality.refused}")
        record.status = "finished"
        record.save(run)
        return record


def load(config: Config) -> Job:
    """Reads the data and the model, and checks that they fit together."""
    task = get_task(config.task.type)
    data, base = config.data, config.model
    splits = read_data(
        data.train,
        data.validation,
        data.test,
        text=data.text,
        text_pair=data.text_pair,
        label=data.label,
        classes=isinstance(task, Classification),
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
    )
    set_seed(config.training.seed)
    pretrained = load_pretrained(
        base.path,
        labels=splits.labels,
        revision=base.revision,
        dtype=base.dtype,
        trust_remote_code=base.trust_remote_code,
    )
    length = resolve_max_length(
        data.max_length, tokenizer_limit=pretrained.tokenizer.model_max_length, positions=pretrained.positions
    )
    return Job(config, task, pretrained, prepare(splits, pretrained.tokenizer, max_length=length), length)


def begin(job: Job) -> tuple[PeftModel, RunRecord]:
    """The model with its rank slots, and the record of a run that begins."""
    adapter, ranks, seed = job.config.adapter, job.config.ranks, job.config.training.seed
    set_seed(seed)
    model = wrap(
        job.pretrained.model,
        mean_rank=ranks.mean,
        max_rank=ranks.resolved_max(),
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        modules_to_save=job.pretrained.new_modules,
    )
    labels, samples = job.data.splits.labels, job.data.samples
    record = RunRecord(
        status="running",
        seed=seed,
        task=job.task.name,
        labels=None if labels is None else list(labels.names),
        data={"hash": job.data.hash, "max_length": job.max_length, "columns": job.data.columns()},
        plan=plan(job.config, model, dict(samples), bf16=job.bf16),
        parameters={"trainable": active_parameters(model)},
    )
    for name, split in samples.items():
        if split.truncated:
            record.notes.append(f"{split.truncated} of {len(split)} {name} texts were cut to {job.max_length} tokens")
    return model, record


def method(
    job: Job, scores_path: Path, progress: Progress | None, *, terms: Sequence[str] | None = None
) -> tuple[QualitySubset, QualityCallback | None, RankCallback]:
    """The method's two halves as the config sets them, and the rows that an epoch trains on."""
    q, r, seed = job.config.quality, job.config.ranks, job.config.training.seed
    samples = job.data.samples["train"]
    data = QualitySubset(
        samples,
        q.fraction,
        seed,
        resample=q.resample,
        lengths=samples.lengths,
        batch_size=job.config.training.batch_size,
    )
    quality = QualityCallback(
        data,
        q.warmup,
        limit=q.warmup_limit,
        weights=q.resolved_weights(),
        temperature=q.resolved_temperature(),
        terms=("gradient_norm", "convergence") if terms is None else terms,
        scope=q.scope,
        reference=q.reference,
        calibration=q.calibrate,
        seed=seed,
        hashes=samples.hashes,
        about={"columns": job.data.columns()},
        scores_path=scores_path,
        progress=progress,
    )
    ranks = RankCallback(
        r.interval,
        warmup=r.warmup,
        freeze=r.freeze,
        moves=r.moves,
        min_rank=r.min,
        gamma=r.gamma,
        policy=r.policy,
        estimator=r.estimator,
        samples=r.samples,
        seed=seed,
    )
    return data, quality if q.enabled else None, ranks


def run_training(
    job: Job,
    model: PeftModel,
    data: QualitySubset,
    record: RunRecord,
    quality: QualityCallback | None,
    ranks: RankCallback,
    run: Path,
    progress: Progress | None,
    *,
    also: tuple[TrainerCallback, ...] = (),
    resume_from: Path | None = None,
) -> None:
    """Warm-up, scoring and training: one stock Trainer, one optimizer, one schedule."""
    settings = job.config.training
    args = training_arguments(
        run / CHECKPOINT_DIR,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        eval_batch_size=settings.eval_batch_size,
        bf16=job.bf16,
        seed=settings.seed,
        further=settings.further_arguments(),
    )
    fit(
        model,
        data,
        args,
        task=job.task,
        tokenizer=job.pretrained.tokenizer,
        validation=job.data.samples["validation"],
        record=record,
        quality=quality,
        ranks=ranks,
        also=also,
        resume_from=resume_from,
        progress=progress,
    )


def score_rows(source: Path, out: Path, *, overrides: Sequence[str] = (), progress: Progress | None = None) -> Scores:
    """All three terms of every training row: after a config's warm-up, or by a run's weights."""
    if not source.is_dir():
        job = load(load_config(source, overrides))
        return warm_up(job, progress, scores_path=out)[0]
    run = open_run(source)
    job = load(run.config)
    q, seed, samples = run.config.quality, run.config.training.seed, job.data.samples["train"]
    scores = score(
        run.model,
        samples,
        job.collate,
        reference=reference_indices(len(samples), q.reference, seed),
        task=job.task,
        weights=q.resolved_weights(),
        temperature=q.resolved_temperature(),
        terms=PAPER_TERMS,
        scope=q.scope,
        calibration=q.calibrate,
        batch_size=run.config.training.batch_size,
        seed=seed,
        hashes=samples.hashes,
        record={"columns": job.data.columns()},
        progress=progress,
    )
    scores.save(out)
    return scores


def allocate_ranks(source: Path, *, overrides: Sequence[str] = (), progress: Progress | None = None) -> dict[str, Any]:
    """LoraConfig's arguments with the ranks that the quality sample asks for."""
    if not source.is_dir():
        config = load_config(source, overrides)
        job = load(config)
        with tempfile.TemporaryDirectory() as folder:
            _, ranks = warm_up(job, progress, scores_path=Path(folder) / SCORES_FILE)
        chosen = ranks.events[0].ranks
    else:
        run = open_run(source)
        config, job = run.config, load(run.config)
        chosen = ranks_of(run, job, source / SCORES_FILE)
    return adapter_config(chosen, scale=config.adapter.alpha / config.ranks.mean)


def ranks_of(run: Trained, job: Job, scores_path: Path) -> dict[str, int]:
    """Ranks by the sensitivities of a trained run, on its quality sample, or at random if unscored."""
    r, seed, samples = run.config.ranks, run.config.training.seed, job.data.samples["train"]
    rows = np.arange(len(samples))
    if scores_path.exists():
        rows = sample(Scores.load(scores_path), run.config.quality.fraction, seed)
    rows = np.random.default_rng([seed, 4]).permutation(rows)[: r.samples]
    measured = sensitivity(
        run.model,
        Subset(samples, sorted(rows.tolist())),  # type: ignore[arg-type]
        job.collate,
        estimator=r.estimator,
        task=job.task,
        batch_size=run.config.training.batch_size,
    )
    return allocate(measured, mean_rank=r.mean, min_rank=r.min, max_rank=r.resolved_max(), gamma=r.gamma)


def warm_up(job: Job, progress: Progress | None, *, scores_path: Path) -> tuple[Scores, RankCallback]:
    """Trains only until the rows are scored and the first ranks are decided.

    Raises NotLearnedError if the model is still at chance when the config gives up.
    """
    model, record = begin(job)
    data, quality, ranks = method(job, scores_path, progress, terms=PAPER_TERMS)
    if quality is None:
        raise SettingsError("quality.enabled is false: there is nothing to score; set it to true")
    with tempfile.TemporaryDirectory() as folder:
        run_training(job, model, data, record, quality, ranks, Path(folder), progress, also=(StopOnceScored(data),))
    if data.scores is None:
        raise NotLearnedError(quality.refused or "the rows were never scored")
    return data.scores, ranks


class StopOnceScored(TrainerCallback):
    """Ends the training at the first step after scoring."""

    def __init__(self, data: QualitySubset) -> None:
        self.data = data

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = False
        control.should_training_stop = not self.data.awaits_scores


def draws_of(config: Config, rows: int, run: Path) -> list[np.ndarray]:
    """The rows that each epoch of a finished run was trained on."""
    data = QualitySubset(range(rows), config.quality.fraction, config.training.seed, resample=config.quality.resample)
    if (run / SCORES_FILE).exists():
        scores = Scores.load(run / SCORES_FILE)
        data.use(scores, int(scores.record["epoch"]))
    return [data.draw(epoch) for epoch in range(config.training.epochs)]


def what_quality_did(job: Job, quality: QualityCallback | None, data: QualitySubset) -> dict[str, Any]:
    """For the record: whether rows were drawn by quality, and if not, why."""
    drawn = {"fraction": job.config.quality.fraction, "rows_an_epoch": len(data)}
    if quality is None:
        return {"enabled": False, "used": False, **drawn}
    told = {"enabled": True, "used": data.scores is not None, **drawn, "attempts": quality.attempts}
    if data.scores is None:
        return told | {"refused": quality.refused}
    return told | {"scores": dict(data.scores.record)}


def _finished(run: Path, config: Config) -> RunRecord | None:
    """The record of a run that is done; None where there is work left.

    Raises SettingsError if the directory's run has other settings.
    """
    if not (run / CONFIG_FILE).exists():
        return None
    if load_config(run / CONFIG_FILE) != config:
        raise SettingsError(f"{run} was begun with other settings: see {run / CONFIG_FILE}; name another --out")
    return RunRecord.load(run) if (run / RECORD_FILE).exists() else None
