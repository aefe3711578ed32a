"""Plan a run before it starts: for `--dry-run`, and as the record's first part."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from tsqlora.data.batches import IGNORED
from tsqlora.data.table import Samples, Table
from tsqlora.quality.cost import look_cost
from tsqlora.quality.rows import REFERENCE_ROWS
from tsqlora.quality.rule import ScoringRule
from tsqlora.run.config import Config, Section
from tsqlora.tasks import Task
from tsqlora.training.fit import Method
from tsqlora.training.lora import active_ranks, layer_shapes, trainable_parameters, used

_SHOWN_CHARACTERS = 600


def plan(
    config: Config,
    task: Task,
    model: Any,
    tables: Mapping[str, Table],
    args: TrainingArguments,
    method: Method,
) -> dict[str, Any]:
    """Samples, steps, budget, initial ranks and passes by phase."""
    data, shapes, ranks = method.data, layer_shapes(model), active_ranks(model)
    batches = math.ceil(len(data) / (args.train_batch_size * args.world_size))
    steps_an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = config.training.steps or math.ceil(config.training.epochs * steps_an_epoch)
    epochs = steps / steps_an_epoch
    idle = without_effect(config)
    if method.ranks is not None and (why := method.ranks.why_idle(steps)):
        idle.append(f"ranks.policy has no effect: {why}")
    return {
        "rows": {name: len(table) for name, table in tables.items()},
        "classes": _classes(task, model, tables["train"].samples),
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
        if changed := [f"{name}.{key}" for key in _changed(section, idle)]:
            notes.append(f"{', '.join(changed)} {'have' if len(changed) > 1 else 'has'} no effect: {why}")
    if not config.training.further_arguments().get("disable_tqdm", True):
        notes.append("training.disable_tqdm has no effect: tsqlora shows progress itself, on stderr")
    return notes


def _changed(section: Section, names: Iterable[str]) -> list[str]:
    default = type(section)()
    return [n for n in type(section).model_fields if n in names and getattr(section, n) != getattr(default, n)]


def _classes(task: Task, model: Any, rows: Samples) -> dict[str, int] | None:
    """Rows of each class by name; None for other tasks."""
    if not task.reading.judges():
        return None
    counts = Counter(rows.labels.tolist())
    return {str(name): counts[j] for j, name in model.config.id2label.items()}


def _passes(task: Task, method: Method, *, epochs: float) -> dict[str, dict[str, int]]:
    """Rows forward and backward in each phase: the first look, and the steps."""
    data, quality, ranks, size = method.data, method.quality, method.ranks, len(method.data)
    phases: dict[str, dict[str, int]] = {}
    n, trusted = len(data.dataset), len(data.trusted)
    if quality.rule.decides(task, trusted > 0):
        rule = quality.rule.trusting(task, trusted > 0)
        phases["look"] = _look(rule, task, rows=n, trusted=trusted)
    elif not quality.rule.select and quality.rule.fits_head(task):
        phases["look"] = {"forward": n + trusted, "backward": 0}
    if ranks is not None and quality.rule.select:
        phases["ranks"] = _both(min(ranks.rows_of(round(size * epochs)), size))
    return phases | {"training": _both(round(size * epochs))}


def _both(rows: int) -> dict[str, int]:
    return {"forward": rows, "backward": rows}


def _look(rule: ScoringRule, task: Task, *, rows: int, trusted: int) -> dict[str, int]:
    """Rows forward and backward in one look."""
    terms = rule.measured_of(task).values()
    reference = trusted or min(REFERENCE_ROWS, rows)
    cost = look_cost(terms, rows=rows, reference=reference, trusted=trusted)
    return {"forward": cost.forward, "backward": cost.backward}


def shown_samples(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Mapping[str, Any]]) -> str:
    """The text of generation samples, and of the tokens that have a loss."""
    return "\n".join(_shown(tokenizer, number, sample) for number, sample in enumerate(samples, start=1)) + "\n"


def _shown(tokenizer: PreTrainedTokenizerBase, number: int, sample: Mapping[str, Any]) -> str:
    ids, targets = sample["input_ids"], [token for token in sample["labels"] if token != IGNORED]
    read, learned = (str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) for tokens in (ids, targets))
    return (
        f"sample {number}: {len(ids)} tokens\n{_shortened(read)}\n"
        f"with a loss: {len(targets)} tokens\n{_shortened(learned)}"
    )


def _shortened(text: str) -> str:
    """Printable text, without the middle if it is long."""
    text, half = "".join(c if c.isprintable() or c == "\n" else " " for c in text), _SHOWN_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"
