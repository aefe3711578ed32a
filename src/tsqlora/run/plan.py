"""What a run will do, before it does it: `--dry-run`, and the record's first page."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from tsqlora.adapter.slots import active_parameters, active_ranks, find_slots
from tsqlora.data.samples import TokenisedSplit
from tsqlora.gradients.sites import lora_layers
from tsqlora.quality.cost import look_cost, trusted_cost
from tsqlora.quality.rows import REFERENCE_ROWS
from tsqlora.quality.rule import PAPER_TERMS, ScoringRule
from tsqlora.quality.trusted import trusted_steps_of
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import used
from tsqlora.ranks.schedule import default_interval
from tsqlora.run.config import Config, QualitySettings, Section
from tsqlora.tasks import Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.training.fit import Method

BYTES_A_ROW = 500
"""Of a row that is scored: hash, place, length, terms and predictions, twice while they are written."""
BYTES_A_TOKEN = 12
"""Of a row that is scored, on disk: its id, its mask and its segment."""


def plan(
    config: Config,
    task: Task,
    model: PeftModel,
    samples: Mapping[str, TokenisedSplit],
    args: TrainingArguments,
    method: Method,
) -> dict[str, Any]:
    """Samples, steps, budget, ranks at the start, passes by phase, and a memory estimate.

    Raises SettingsError for a budget below the least ranks.
    """
    data, ranks_callback = method.data, method.ranks
    assert ranks_callback is not None
    ranks = active_ranks(model)
    shapes = {name: slots.shape for name, slots in find_slots(model).items()}
    batches = math.ceil(len(data) / (args.train_batch_size * args.world_size))
    steps_an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = config.training.max_steps or math.ceil(config.training.epochs * steps_an_epoch)
    epochs = steps / steps_an_epoch
    idle = without_effect(config)
    options = ranks_callback.options
    interval = options["interval"] or default_interval(steps)
    if options["policy"] != "fixed" and not options["schedule"].steps(steps, interval):
        idle.append(f"ranks.policy without effect: no adjustment fits into {steps} steps at an interval of {interval}")
    require_ranks(config, shapes)
    return {
        "rows": {name: len(split) for name, split in samples.items()},
        "classes": _classes(task, model, samples["train"]),
        "rows_an_epoch": len(data),
        "epochs": math.ceil(epochs),
        "steps": steps,
        "passes": _passes(task, method, epochs=epochs, batch=args.train_batch_size * args.gradient_accumulation_steps),
        "ranks": ranks,
        "budget": used(ranks, shapes),
        "trainable": active_parameters(model),
        "bf16": args.bf16,
        "memory_bytes": memory(config, task, model, longest=max(samples["train"].lengths), bf16=args.bf16),
        "without_effect": idle,
    }


def require_ranks(config: Config, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises SettingsError where the least ranks of layers of these shapes cost more than there is."""
    uniform = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "uniform", 0)
    allocate(uniform, mean_rank=config.ranks.mean, min_rank=config.ranks.min, max_rank=config.ranks.resolved_max())


def without_effect(config: Config) -> list[str]:
    """Settings that are not their default and count for nothing beside the others, each group with the reason."""
    found = list[tuple[str, Section, Iterable[str], str]]()
    if not config.quality.enabled:
        idle = QualitySettings.model_fields.keys() - {"enabled", "fraction", "resample", "head_start"}
        found.append(("quality", config.quality, idle, "quality.enabled is false"))
    if config.ranks.policy == "fixed":
        idle = {"interval", *([] if config.quality.enabled else ["estimator"])}
        found.append(("ranks", config.ranks, idle, "ranks.policy is fixed"))
    changed = (([f"{of}.{name}" for name in _changed(section, idle)], why) for of, section, idle, why in found)
    told = [f"{', '.join(names)} without effect: {why}" for names, why in changed if names]
    if not config.training.further_arguments().get("disable_tqdm", True):
        told.append("training.disable_tqdm without effect: tsqlora shows progress itself, on stderr")
    return told


def _changed(section: Section, names: Iterable[str]) -> list[str]:
    """Those of the settings that are not as they are by default, in the order of the section."""
    default = type(section)()
    return [n for n in type(section).model_fields if n in names and getattr(section, n) != getattr(default, n)]


def _classes(task: Task, model: PeftModel, rows: TokenisedSplit) -> dict[str, int] | None:
    """Rows of each class, by its name; None where there are no classes."""
    if not isinstance(task, Classification):
        return None
    counts = Counter(rows.labels.tolist())
    return {str(name): counts[j] for j, name in model.config.id2label.items()}


def scoring_plan(config: Config, task: Task, model: PeftModel, *, rows: int, max_length: int) -> dict[str, Any]:
    """Rows, batches, passes, and bounds of memory and disk."""
    rule = ScoringRule(weights=config.quality.resolved_weights(), terms=PAPER_TERMS)
    return {
        "rows": rows,
        "batches": math.ceil(rows / config.training.batch_size),
        "passes": {"look": _look(rule, task, rows=rows, trusted=0)},
        "memory_bytes": memory(config, task, model, longest=max_length, bf16=False) + rows * BYTES_A_ROW,
        "disk_bytes": rows * max_length * BYTES_A_TOKEN,
    }


def _passes(task: Task, method: Method, *, epochs: float, batch: int) -> dict[str, dict[str, int]]:
    """Rows that go forward and backward in each phase: of the first look, and of the steps."""
    data, quality, ranks, size = method.data, method.quality, method.ranks, len(method.data)
    found: dict[str, dict[str, int]] = {}
    n, trusted = len(data.dataset), len(data.trusted)
    if quality is not None and quality.rule.decides(task, trusted > 0):
        rule = quality.rule.trusting(task, trusted > 0)
        found["look"] = _look(rule, task, rows=n, trusted=trusted)
        if trusted and rule.trusts:
            trained, rows = trusted_steps_of(task, trusted, batch)
            cost = trusted_cost(n, steps=trained, batch_size=rows)
            found["trusted model"] = {"forward": cost.forward, "backward": cost.backward}
    elif quality is not None and not quality.rule.select:
        found["look"] = {"forward": n + trusted, "backward": 0}
    if ranks is not None and quality is not None and quality.rule.select:
        found["ranks"] = _both(min(ranks.rows_of(round(size * epochs)), size))
    return found | {"training": _both(round(size * epochs))}


def _both(rows: int) -> dict[str, int]:
    return {"forward": rows, "backward": rows}


def _look(rule: ScoringRule, task: Task, *, rows: int, trusted: int) -> dict[str, int]:
    """Rows forward and backward in one look."""
    terms = [term for term in rule.measured().values() if not (term.answers and isinstance(task, Generation))]
    reference = trusted or min(REFERENCE_ROWS, rows)
    cost = look_cost(terms, rows=rows, reference=reference, trusted=trusted)
    return {"forward": cost.forward, "backward": cost.backward}


def memory(config: Config, task: Task, model: PeftModel, *, longest: int, bf16: bool) -> int:
    """A rough peak of training in bytes: weights, gradients and moments, linear layers' activations."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers: list[Any] = list(lora_layers(model).values())
    features = sum(layer.in_features + 2 * layer.out_features for layer in layers)
    if isinstance(task, Generation):
        features += 3 * int(getattr(model.config, "vocab_size", 0))  # logits, in float32 once more, and their gradient
    return weights + trained + config.training.batch_size * longest * features * (2 if bf16 else 4)
