"""Plan a run before it starts: for `--dry-run`, and as the record's first part."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from tsqlora.cost import look_cost
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.datasets import REFERENCE_ROWS
from tsqlora.settings import Config, Section
from tsqlora.tasks import Task
from tsqlora.training.fit import Method
from tsqlora.training.job import Job
from tsqlora.training.lora import active_ranks, layer_shapes, trainable_parameters, used

_SHOWN_CHARACTERS = 600


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
