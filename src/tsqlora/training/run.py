"""Plan, train and measure a job: the Trainer's arguments, the record, and metrics."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from tsqlora import distributed
from tsqlora.auditing.texts.raw import worst_findings
from tsqlora.auditing.texts.vocabulary import vocabulary_of_answers
from tsqlora.errors import SettingsError
from tsqlora.libs.transformers import installed_reporters, reporter_kinds
from tsqlora.model.terms import look_cost
from tsqlora.progress import Progress
from tsqlora.record import RunRecord
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.datasets import REFERENCE_ROWS
from tsqlora.rows.splits import MEASURED, held_out_rows
from tsqlora.rows.table import data_hash, notes_of
from tsqlora.rows.tokens import left_out
from tsqlora.run_dir import CHECKPOINT_DIR
from tsqlora.settings import Config, Section
from tsqlora.tasks import Task, answers_of, get_task, require_room
from tsqlora.tasks.text_metrics import require_text_metrics
from tsqlora.training.job import Job, Method, start_notes
from tsqlora.training.lora import active_ranks, layer_shapes, trainable_parameters, used
from tsqlora.training.predict import EVAL_BATCH, cuts, predictor_of

MANY = 0.1
"""Share of rows left out, above which the note is a warning before training."""
_REPORTERS = {"mlflow", "tensorboard", "wandb"}
"""Reporters that are packages of the same name."""
_BEST = {"eval_strategy": "epoch", "metric_for_best_model": "loss"}
"""Evaluation that training.save_strategy best needs, unless it is set."""
_SHOWN_CHARACTERS = 600
"""Of a text in a dry run."""


def arguments(config: Config, run: Path, *, micro_batch_size: int | None = None) -> TrainingArguments:
    """The Trainer's arguments; bfloat16 by the config, or else if the hardware has it.

    `micro_batch_size`: rows that a device takes at once; gradients accumulate to whole batches. Rows come in the order
    of the draw, which holds batches of like length already.
    """
    settings = config.training
    values: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 10,
        "disable_tqdm": True,
        # On, the Trainer multiplies a loss by the number of processes that BERT's, being a mean, is not divided by.
        "average_tokens_across_devices": False,
        # Not on Apple's MPS, where nothing was tried; `use_cpu: false` does.
        "use_cpu": not torch.cuda.is_available(),
        "per_device_eval_batch_size": EVAL_BATCH,
        **get_task(config.task.type).reading.trainer,
    }
    further = settings.further_arguments()
    values |= (_BEST if further.get("save_strategy") == "best" else {}) | further
    values.setdefault("bf16", hardware_has_bf16() and not further.get("fp16"))
    rows = micro_batch_size or settings.batch_size
    if rows < settings.batch_size:
        parts = settings.batch_size // rows
        values["gradient_accumulation_steps"] = int(values.get("gradient_accumulation_steps", 1)) * parts
        values["per_device_eval_batch_size"] = max(1, values["per_device_eval_batch_size"] // parts)
    values |= {
        "output_dir": str(run / CHECKPOINT_DIR),
        "num_train_epochs": settings.epochs,
        "max_steps": -1 if settings.steps is None else settings.steps,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": rows,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "train_sampling_strategy": "sequential",
    }
    named = values["report_to"] or "none"
    try:
        reporter_kinds(named)
    except ValueError as error:
        raise SettingsError(f"training.report_to: {error}") from None
    for name in sorted({named} if isinstance(named, str) else {*named}):
        if name in _REPORTERS and name not in installed_reporters():
            raise SettingsError(f"training.report_to: {name} is not installed; install it with: pip install {name}")
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"training: {error}") from error


def hardware_has_bf16() -> bool:
    """Whether bfloat16 is computed by the GPU or processor itself: elsewhere it is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has no such function
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def plan(job: Job, args: TrainingArguments, method: Method) -> dict[str, Any]:
    """Samples, steps, budget, initial ranks and passes by phase."""
    config, task, model, data = job.config, job.task, job.model, method.data
    shapes, ranks = layer_shapes(model), active_ranks(model)
    batches = math.ceil(len(data) / (args.train_batch_size * args.world_size))
    steps_an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = config.training.steps or math.ceil(config.training.epochs * steps_an_epoch)
    epochs = steps / steps_an_epoch
    idle, classes = without_effect(config), None
    if task.reading.judges():
        counts = Counter(job.train.samples.labels.tolist())
        classes = {str(name): counts[j] for j, name in model.config.id2label.items()}
    if method.ranks is not None and (why := method.ranks.why_idle(steps)):
        idle.append(f"ranks.policy has no effect: {why}")
    return {
        "rows": {name: len(table) for name, table in job.data.items()},
        "classes": classes,
        "rows_an_epoch": len(data),
        "epochs": math.ceil(epochs),
        "steps": steps,
        "passes": _passes(task, method, epochs=epochs),
        "ranks": ranks,
        "budget": used(ranks, shapes),
        "trainable": trainable_parameters(model),
        "bf16": args.bf16,
        "without_effect": idle,
    }


def without_effect(config: Config) -> list[str]:
    """Settings that are not at their defaults and have no effect beside the others, with the reasons."""
    groups = list[tuple[str, Section, Iterable[str], str]]()
    if not config.quality.enabled:
        groups.append(("quality", config.quality, {"preset"}, "quality.enabled is false"))
    if not config.ranks.moves:
        idle = {"interval", *([] if config.quality.enabled else ["min", "max"])}
        groups.append(("ranks", config.ranks, idle, "ranks.policy is fixed"))
    notes = list[str]()
    for name, section, idle, why in groups:
        default = type(section)()
        unlike = (n for n in type(section).model_fields if getattr(section, n) != getattr(default, n))
        if changed := [f"{name}.{key}" for key in unlike if key in idle]:
            notes.append(f"{', '.join(changed)} {'have' if len(changed) > 1 else 'has'} no effect: {why}")
    if not config.training.further_arguments().get("disable_tqdm", True):
        notes.append("training.disable_tqdm has no effect: tsqlora shows progress itself, on stderr")
    return notes


def _passes(task: Task, method: Method, *, epochs: float) -> dict[str, dict[str, int]]:
    """Rows forward and backward in each phase: the first look, and the steps."""
    data, quality, ranks, size = method.data, method.quality, method.ranks, len(method.data)
    phases = dict[str, tuple[int, int]]()
    n, trusted = len(data.dataset), len(data.trusted)
    if quality.rule.decides(task, trusted > 0):
        terms = quality.rule.trusting(task, trusted > 0).measured_of(task).values()
        cost = look_cost(terms, rows=n, reference=trusted or min(REFERENCE_ROWS, n), trusted=trusted)
        phases["look"] = cost.forward, cost.backward
    elif not quality.rule.select and quality.rule.fits_head(task):
        phases["look"] = n + trusted, 0
    if ranks is not None and quality.rule.select:
        measured = min(ranks.rows_of(round(size * epochs)), size)
        phases["ranks"] = measured, measured
    phases["training"] = round(size * epochs), round(size * epochs)
    return {phase: {"forward": forward, "backward": backward} for phase, (forward, backward) in phases.items()}


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
            if job.task.reading.judges() and (task := answers_of(job.task)) is not None:
                logits, labels = predictor.answers(samples, phase=split)
                record.metrics[split] = task.metrics(logits, labels)
                pairs = np.stack([labels, task.predictions(logits)], axis=1)
                record.confusions = np.column_stack(np.unique(pairs, axis=0, return_counts=True)).tolist()
            else:
                record.metrics[split] = predictor.metrics(samples, phase=split)
            if split == "test":
                record.metrics[split] |= predictor.text_metrics(job.data[split])
        cost.add(forward=len(samples), tokens=sum(samples.lengths))
    noise = next((look["noise"] for look in record.quality.get("looks", ()) if look.get("noise")), {})
    if noise.get("evident") and held_out_rows(job.data):
        name, value = next(iter(record.metrics["validation"].items()))
        record.notes.append(
            f"validation has {name} {value:.3f} on rows that were held out of the training file: about "
            f"{noise['rate']:.0%} of their labels seem wrong, too, so this says less than correct labels would"
        )
    record.status = "finished"


def shown_samples(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Mapping[str, Any]]) -> str:
    """The text of generation samples, and of the tokens that have a loss."""

    def text(tokens: Any) -> str:
        """Printable, without the middle if it is long."""
        read, half = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)), _SHOWN_CHARACTERS // 2
        read = "".join(c if c.isprintable() or c == "\n" else " " for c in read)
        return read if len(read) <= 2 * half else f"{read[:half]} … {read[-half:]}"

    shown = list[str]()
    for number, sample in enumerate(samples, start=1):
        ids, targets = sample["input_ids"], [token for token in sample["labels"] if token != IGNORED]
        shown += [f"sample {number}: {len(ids)} tokens", text(ids)]
        shown += [f"with a loss: {len(targets)} tokens", text(targets)]
    return "\n".join(shown) + "\n"
