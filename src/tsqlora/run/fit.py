"""One training of a job: arguments, model and record, one stock Trainer, metrics."""

from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from tsqlora.adapter.slots import active_parameters
from tsqlora.data.generation import least_prompt
from tsqlora.data.splits import MEASURED
from tsqlora.progress import Progress
from tsqlora.run.config import Config
from tsqlora.run.job import Job, with_slots
from tsqlora.run.plan import plan, without_effect
from tsqlora.run.predictor import EVAL_BATCH, Predictor
from tsqlora.run.start import start_notes
from tsqlora.tasks import GENERATION
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.texts import require_text_metrics
from tsqlora.training.arguments import hardware_has_bf16, training_arguments
from tsqlora.training.fit import Method
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import CHECKPOINT_DIR
from tsqlora.training.write import require_room


def arguments(config: Config, run: Path, *, micro_batch_size: int | None = None) -> TrainingArguments:
    """The Trainer's arguments; bfloat16 where the config says so, or else where the hardware has it.

    `micro_batch_size`: a device takes a batch in parts of so many rows, whose gradients are accumulated.
    """
    settings = config.training
    # Of a validation in mid-run no logits of text are kept: they are a vocabulary wide, for every token.
    further = {
        "per_device_eval_batch_size": EVAL_BATCH,
        **({"prediction_loss_only": True} if config.task.type in GENERATION else {}),
        **settings.further_arguments(),
    }
    further.setdefault("bf16", hardware_has_bf16() and not further.get("fp16"))
    rows = micro_batch_size or settings.batch_size
    if rows < settings.batch_size:
        parts = settings.batch_size // rows
        further["gradient_accumulation_steps"] = int(further.get("gradient_accumulation_steps", 1)) * parts
        further["per_device_eval_batch_size"] = max(1, further["per_device_eval_batch_size"] // parts)
    return training_arguments(
        run / CHECKPOINT_DIR,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        batch_size=rows,
        eval_batch_size=further.pop("per_device_eval_batch_size"),
        bf16=further.pop("bf16"),
        seed=settings.seed,
        further=further,
    )


def begin(job: Job, args: TrainingArguments, method: Method) -> tuple[PeftModel, RunRecord]:
    """The model with its rank slots, and the record of a run that begins."""
    _require_measurable(job)
    config, splits, samples = job.config, job.data.splits, job.data.samples
    model = with_slots(config, job.pretrained)
    texts = {} if splits.format is None else {"format": splits.format.name}
    record = RunRecord(
        status="running",
        seed=config.training.seed,
        task=job.task.name,
        labels=None if splits.labels is None else list(splits.labels.names),
        data={"hash": job.data.hash, "max_length": job.max_length, "columns": job.data.columns(), **texts},
        plan=plan(config, job.task, model, samples, args, method),
        parameters={"trainable": active_parameters(model)},
    )
    record.notes += job.data.notes
    record.notes += start_notes(config, record.labels)
    for name, split in samples.items():
        if split.truncated:
            what = "prompts" if texts else "texts"
            record.notes.append(f"{split.truncated} of {len(split)} {name} {what} were cut to {job.max_length} tokens")
    if config.model.trust_remote_code:
        record.notes.append("code that came with the model was run: model.trust_remote_code was true")
    record.notes += without_effect(config)
    return model, record


def _require_measurable(job: Job) -> None:
    """Raises SettingsError where the texts that a model writes on the test rows could not be measured in the end."""
    splits = job.data.splits
    if not isinstance(job.task, Generation) or "test" not in splits.sources:
        return
    if splits.format is not None and splits.format.name == "text":
        return
    require_text_metrics()
    shortest = least_prompt(job.pretrained.tokenizer) if job.task.causal else 1
    require_room(job.pretrained.positions, job.config.task.max_new_tokens, longest=shortest)


def predictor_of(job: Job, model: nn.Module, args: TrainingArguments) -> Predictor:
    """Inference as the settings have it, in training's precision."""
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
    """Add the metrics of validation and test to the record; of generated text, what is written on the test rows."""
    predictor, splits = predictor_of(job, model, args), job.data.splits
    for split in (name for name in MEASURED if name in job.data.samples):
        samples = job.data.samples[split]
        with record.timed("evaluation") as cost:
            record.metrics[split] = predictor.metrics(samples.samples, phase=split, progress=progress)
            if split == "test" and splits.format is not None:
                record.metrics[split] |= predictor.text_metrics(splits.rows(split), splits.format, progress=progress)
        cost.add(forward=len(samples), tokens=sum(samples.lengths))
