"""Train and measure a job: the Trainer's arguments, model and record, inference, and metrics."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

from tsqlora import distributed
from tsqlora.data.batches import padded_labels
from tsqlora.data.splits import MEASURED, held_out_rows
from tsqlora.data.table import Samples, Table, data_hash, notes_of
from tsqlora.data.tokens import left_out, references
from tsqlora.progress import Progress
from tsqlora.quality.rule import Compute
from tsqlora.run.config import Config
from tsqlora.run.job import Job
from tsqlora.run.plan import plan, without_effect
from tsqlora.run.start import start_notes
from tsqlora.tasks import Collate, Task, get_task, require_room
from tsqlora.tasks.text_metrics import require_text_metrics, text_metrics
from tsqlora.text.before import worst_findings
from tsqlora.text.vocabulary import vocabulary_of_answers
from tsqlora.training.fit import Method, hardware_has_bf16, training_arguments
from tsqlora.training.load import positions_of
from tsqlora.training.predict import predict_logits, summed_counts, write_texts
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import CHECKPOINT_DIR

EVAL_BATCH = 64
"""Samples of an evaluation batch, unless training.per_device_eval_batch_size is set."""
MANY = 0.1
"""Share of rows left out, above which the note is a warning before training."""
_BEST = {"eval_strategy": "epoch", "metric_for_best_model": "loss"}
"""Evaluation that training.save_strategy best needs, unless it is set."""


def arguments(config: Config, run: Path, *, micro_batch_size: int | None = None) -> TrainingArguments:
    """The Trainer's arguments; bfloat16 by the config, or else if the hardware has it.

    `micro_batch_size`: rows that a device takes at once; gradients accumulate to whole batches.
    """
    settings, task = config.training, get_task(config.task.type)
    further: dict[str, Any] = {
        "per_device_eval_batch_size": EVAL_BATCH,
        **task.reading.trainer,
        **settings.further_arguments(),
    }
    if further.get("save_strategy") == "best":
        further = _BEST | further
    further.setdefault("bf16", hardware_has_bf16() and not further.get("fp16"))
    rows = micro_batch_size or settings.batch_size
    if rows < settings.batch_size:
        parts = settings.batch_size // rows
        further["gradient_accumulation_steps"] = int(further.get("gradient_accumulation_steps", 1)) * parts
        further["per_device_eval_batch_size"] = max(1, further["per_device_eval_batch_size"] // parts)
    return training_arguments(
        run / CHECKPOINT_DIR,
        epochs=settings.epochs,
        max_steps=further.pop("max_steps", None),
        learning_rate=settings.learning_rate,
        batch_size=rows,
        eval_batch_size=further.pop("per_device_eval_batch_size"),
        bf16=further.pop("bf16"),
        seed=settings.seed,
        further=further,
    )


def begin(job: Job, args: TrainingArguments, method: Method, model: nn.Module) -> RunRecord:
    """The record of a run that starts with this model.  Raises SettingsError for texts that could not be measured."""
    config, train = job.config, job.train
    _require_measurable(job)
    first = plan(config, job.task, model, job.data, args, method)
    texts = {} if train.format is None else {"format": train.format.name}
    record = RunRecord(
        status="running",
        seed=config.training.seed,
        task=job.task.name,
        labels=None if train.classes is None else list(train.classes.names),
        data={"hash": data_hash(job.data), "max_length": job.max_length, "columns": asdict(train.columns), **texts},
        plan=first,
        parameters={"trainable": first["trainable"]},
        ranks=first["ranks"],
    )
    record.notes += notes_of(job.data)
    for samples in (table.samples for table in job.data.values()) if distributed.is_first() else ():
        if len(samples.left_out) > MANY * (len(samples) + len(samples.left_out)):
            warnings.warn(left_out(samples)[0], stacklevel=2)
    record.notes += start_notes(config, record.labels)
    for name, table in job.data.items():
        if table.samples.truncated:
            what = f"{name} {job.task.reading.noun(train.format)}"
            record.notes.append(_cuts(table.samples, what, job.max_length))
    if config.model.trust_remote_code:
        record.notes.append("code from the model's repository ran: model.trust_remote_code was true")
    record.notes += without_effect(config)
    if train.format is not None and (vocabulary := vocabulary_of_answers(job.pretrained.tokenizer, model)) is not None:
        how = {"max_length": job.max_length, "most": config.data.max_bad_rows}
        worst = worst_findings(train.samples, vocabulary, table=train, **how)
        record.notes += worst
        for finding in worst if distributed.is_first() else ():
            warnings.warn(finding, stacklevel=2)
    further = config.training.further_arguments()
    if further.get("save_strategy") == "best" and (unset := _BEST.keys() - further.keys()):
        used = ", ".join(f"training.{name} {_BEST[name]}" for name in sorted(unset))
        record.notes.append(f"training.save_strategy best uses {used}; set them to change that")
    return record


def _require_measurable(job: Job) -> None:
    """Raises SettingsError if the texts that a model will write on test rows could not be measured."""
    format, pretrained, new = job.train.format, job.pretrained, job.config.task.max_new_tokens
    if "test" not in job.data or format is None or format.name == "text":
        return
    require_text_metrics()
    job.task.reading.prompt_limit(job.max_length, pretrained.tokenizer, pretrained.positions, new)
    require_room(pretrained.positions, new)


@dataclass(frozen=True, slots=True)
class Predictor:
    """Batching, precision and generation limits for inference."""

    model: nn.Module
    task: Task
    tokenizer: Any
    max_length: int
    batch_size: int
    bf16: bool
    max_new_tokens: int
    beams: int

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt: the positions of a causal model must also hold the text that it writes."""
        positions, new = positions_of(self.model), self.max_new_tokens
        return self.task.reading.prompt_limit(self.max_length, self.tokenizer, positions, new)

    def logits(self, samples: Sequence[dict[str, Any]], *, phase: str, progress: Progress | None) -> np.ndarray:
        """n × k logits of a task with one answer a sample."""
        return predict_logits(
            self.model,
            samples,
            self.collate(),
            task=self.task,
            phase=phase,
            progress=progress,
            **self._batching,
        )

    def metrics(self, samples: Sequence[dict[str, Any]], *, phase: str, progress: Progress | None) -> dict[str, float]:
        """The task's metrics on labelled samples; for generation those of the rows' targets."""

        def logits(samples: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
            z = self.logits(samples, phase=phase, progress=progress)
            return z, padded_labels([sample["labels"] for sample in samples], z.shape[1] if z.ndim == 3 else None)

        def summed(samples: Sequence[dict[str, Any]], count: Any) -> dict[str, float]:
            compute = Compute(**self._batching, progress=progress)
            return summed_counts(self.model, samples, self.collate(), self.task, count, phase=phase, compute=compute)

        return self.task.evaluate(samples, logits=logits, summed=summed)

    def prompts(self, table: Table, *, measured: bool = False) -> Samples:
        """The prompt of each row; `measured` as in `tokenise_generation`."""
        rows, how = list(table), {"with_targets": False, "measured": measured}
        return self.task.reading.encode(rows, table.format, self.tokenizer, max_length=self.prompt_length, **how)

    def texts(self, prompts: Samples, *, phase: str, progress: Progress | None) -> list[str]:
        """Generate a text for each prompt."""
        return write_texts(
            self.model,
            prompts,
            self.collate(prompts=True),
            self.tokenizer,
            max_new_tokens=self.max_new_tokens,
            beams=self.beams,
            phase=phase,
            compute=Compute(**self._batching, progress=progress),
        )

    def text_metrics(self, table: Table, *, progress: Progress | None) -> dict[str, float]:
        """Compare generated texts with the rows' targets; nothing for rows without them, such as plain text."""
        if table.format is None or table.format.name == "text":
            return {}
        require_text_metrics()
        prompts = self.prompts(table, measured=True)
        if self.prompt_length < self.max_length:  # reading the rows warns about cuts by max_length
            warn_of_cuts(prompts, table.name, "prompts", self.prompt_length)
        written = self.texts(prompts, phase="writing", progress=progress)
        return text_metrics(written, references(table, table.format))

    def collate(self, **how: Any) -> Collate:
        """A collator; with `prompts` for those to continue."""
        return self.task.reading.collate(self.model, self.tokenizer, max_length=self.max_length, **how)

    @property
    def _batching(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "autocast": torch.bfloat16 if self.bf16 else None}


def warn_of_cuts(split: Samples, source: str, what: str, length: int) -> None:
    """Warn if rows were cut."""
    if split.truncated:
        warnings.warn(_cuts(split, f"{what} of {source}", length), stacklevel=3)


def _cuts(split: Samples, what: str, length: int) -> str:
    words = f"; {split.cut_words} of their words are behind the cut, without a tag" if split.cut_words else ""
    return f"{split.truncated} of {len(split)} {what} were cut to {length} tokens{words}"


def predictor_of(job: Job, model: nn.Module, args: TrainingArguments) -> Predictor:
    """Inference by the settings, in training's precision."""
    return Predictor(
        model,
        job.task,
        job.pretrained.tokenizer,
        job.max_length,
        batch_size=args.per_device_eval_batch_size,
        bf16=args.bf16,
        max_new_tokens=job.config.task.max_new_tokens,
        beams=job.config.task.beams,
    )


def measure(job: Job, model: nn.Module, record: RunRecord, args: TrainingArguments, progress: Progress | None) -> None:
    """Add the metrics of validation and test rows, for texts also those of written ones, and finish the record."""
    predictor = predictor_of(job, model, args)
    for split in (name for name in MEASURED if name in job.data):
        samples = job.data[split].samples
        with record.timed("evaluation") as cost:
            record.metrics[split] = predictor.metrics(samples, phase=split, progress=progress)
            if split == "test":
                record.metrics[split] |= predictor.text_metrics(job.data[split], progress=progress)
        cost.add(forward=len(samples), tokens=sum(samples.lengths))
    noise = next((look["noise"] for look in record.quality.get("looks", ()) if look.get("noise")), {})
    if noise.get("evident") and held_out_rows(job.data):
        name, value = next(iter(record.metrics["validation"].items()))
        record.notes.append(
            f"validation has a {name} of {value:.3f} on rows that were held out of the training file: about "
            f"{noise['rate']:.0%} of their labels seem wrong, too, so this says less than correct labels would"
        )
    record.status = "finished"
