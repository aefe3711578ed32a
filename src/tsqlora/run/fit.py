"""Train and measure a job: the Trainer's arguments, the record, and metrics."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tsqlora import distributed
from tsqlora.data.splits import MEASURED, held_out_rows
from tsqlora.data.table import data_hash, notes_of
from tsqlora.data.tokens import left_out
from tsqlora.progress import Progress
from tsqlora.run.config import Config
from tsqlora.run.job import Job, start_notes
from tsqlora.run.plan import plan, without_effect
from tsqlora.run.predict import EVAL_BATCH, cuts, predictor_of
from tsqlora.tasks import get_task, require_room
from tsqlora.tasks.text_metrics import require_text_metrics
from tsqlora.text.before import worst_findings
from tsqlora.text.vocabulary import vocabulary_of_answers
from tsqlora.training.fit import Method, hardware_has_bf16, training_arguments
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import CHECKPOINT_DIR

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


def begin(job: Job, args: TrainingArguments, method: Method) -> RunRecord:
    """The record of a run that starts with the model of the job.

    Raises SettingsError for texts that could not be measured.
    """
    config, train, reading, new = job.config, job.train, job.task.reading, job.config.task.max_new_tokens
    if "test" in job.data and train.format is not None and train.format.name != "text":  # texts will be written
        require_text_metrics()
        reading.prompt_limit(job.max_length, job.tokenizer, job.pretrained.positions, new)
        require_room(job.pretrained.positions, new)
    first = plan(job, args, method)
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
            record.notes.append(cuts(table.samples, f"{name} {reading.noun(train.format)}", job.max_length))
    if config.model.trust_remote_code:
        record.notes.append("code from the model's repository ran: model.trust_remote_code was true")
    record.notes += without_effect(config)
    if train.format is not None and (vocabulary := vocabulary_of_answers(job.tokenizer, job.model)) is not None:
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


def measure(job: Job, record: RunRecord, args: TrainingArguments, progress: Progress | None) -> None:
    """Add the metrics of validation and test rows, for texts also those of written ones, and finish the record."""
    predictor = predictor_of(job, args, progress)
    for split in (name for name in MEASURED if name in job.data):
        samples = job.data[split].samples
        with record.timed("evaluation") as cost:
            record.metrics[split] = predictor.metrics(samples, phase=split)
            if split == "test":
                record.metrics[split] |= predictor.text_metrics(job.data[split])
        cost.add(forward=len(samples), tokens=sum(samples.lengths))
    noise = next((look["noise"] for look in record.quality.get("looks", ()) if look.get("noise")), {})
    if noise.get("evident") and held_out_rows(job.data):
        name, value = next(iter(record.metrics["validation"].items()))
        record.notes.append(
            f"validation has a {name} of {value:.3f} on rows that were held out of the training file: about "
            f"{noise['rate']:.0%} of their labels seem wrong, too, so this says less than correct labels would"
        )
    record.status = "finished"
