"""What a run will do, before it does it: `--dry-run`, and the record's first page."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

from peft import PeftModel
from transformers import TrainingArguments

from tsqlora.adapter.slots import active_parameters, active_ranks, find_slots
from tsqlora.data.samples import TokenisedSplit
from tsqlora.errors import SettingsError
from tsqlora.gradients.sites import lora_layers
from tsqlora.quality.rows import REFERENCE_ROWS
from tsqlora.quality.rule import PAPER_TERMS, wanted_terms
from tsqlora.quality.subset import QualitySubset
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import used
from tsqlora.ranks.schedule import require_adjustments
from tsqlora.run.config import Config, QualitySettings, Section
from tsqlora.tasks import Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.training.cost import scoring_passes
from tsqlora.training.fit import Method
from tsqlora.training.quality_callback import QualityCallback

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

    Raises SettingsError for what could not be carried out: no epoch left after the warm-up,
    no step at which ranks may change, a budget below the least ranks.
    """
    data, ranks_callback = method.data, method.ranks
    assert ranks_callback is not None
    ranks = active_ranks(model)
    shapes = {name: slots.shape for name, slots in find_slots(model).items()}
    batches = math.ceil(len(data) / (args.train_batch_size * args.world_size))
    steps_an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = config.training.max_steps or math.ceil(config.training.epochs * steps_an_epoch)
    epochs = steps / steps_an_epoch
    if ranks_callback.options["policy"] != "fixed":
        require_adjustments(steps, **{name: ranks_callback.options[name] for name in ("interval", "warmup", "freeze")})
    uniform = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "uniform", 0)
    allocate(
        uniform, mean_rank=config.ranks.mean, min_rank=config.ranks.min, max_rank=config.ranks.resolved_max()
    )  # raises where the least ranks cost more than there is
    return {
        "rows": {name: len(split) for name, split in samples.items()},
        "classes": _classes(task, model, samples["train"]),
        "rows_an_epoch": len(data),
        "epochs": math.ceil(epochs),
        "steps": steps,
        "passes": _passes(task, method, epochs=epochs),
        "ranks": ranks,
        "budget": used(ranks, shapes),
        "trainable": active_parameters(model),
        "bf16": args.bf16,
        "memory_bytes": memory(config, task, model, longest=max(samples["train"].lengths), bf16=args.bf16),
        "without_effect": without_effect(config),
    }


def without_effect(config: Config) -> list[str]:
    """Settings that are not their default and count for nothing beside the others, each group with the reason."""
    found = list[tuple[str, Section, Iterable[str], str]]()
    if not config.quality.enabled:
        idle = QualitySettings.model_fields.keys() - {"enabled", "fraction", "resample"}
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


def scoring_plan(
    config: Config, task: Task, model: PeftModel, *, rows: int, max_length: int, warmup: bool
) -> dict[str, Any]:
    """Rows, batches, passes by phase, and bounds of memory and disk; with `warmup` it is trained first.

    Raises SettingsError for a warm-up that is longer than the run.
    """
    q = config.quality
    terms = (*PAPER_TERMS, *(q.resolved_weights() or {}))
    passes = {"scoring": _scoring(task, terms, rows=rows, reference=REFERENCE_ROWS)}
    if warmup:
        quality = QualityCallback(QualitySubset(range(rows), q.fraction), q.warmup)
        require_scored_epoch(quality, config.training.epochs)
        passes = {"warm-up": _both(quality.warmup_epochs * len(quality.data))} | passes
    return {
        "rows": rows,
        "batches": math.ceil(rows / config.training.batch_size),
        "passes": passes,
        "memory_bytes": memory(config, task, model, longest=max_length, bf16=False) + rows * BYTES_A_ROW,
        "disk_bytes": rows * max_length * BYTES_A_TOKEN,
    }


def _passes(task: Task, method: Method, *, epochs: float) -> dict[str, dict[str, int]]:
    """Rows that go forward and backward in each phase, if the first test finds that the model has learned."""
    data, quality, ranks, size = method.data, method.quality, method.ranks, len(method.data)
    if quality is None or ranks is None:
        return {"training": _both(round(size * epochs))}
    require_scored_epoch(quality, epochs)
    warmup = quality.warmup_epochs
    return {
        "warm-up": _both(size * warmup),
        "scoring": _scoring(task, quality.terms, rows=len(data.dataset), reference=cast(int, quality.rule.reference)),
        "ranks": _both(min(ranks.samples, size)),
        "training": _both(round(size * (epochs - warmup))),
    }


def _both(rows: int) -> dict[str, int]:
    return {"forward": rows, "backward": rows}


def _scoring(task: Task, terms: Iterable[str], *, rows: int, reference: int) -> dict[str, int]:
    """Rows forward and backward in one scoring that has these terms."""
    known = wanted_terms(terms).values()
    cost = scoring_passes(known, text=isinstance(task, Generation)).cost(rows, min(reference, rows))
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


def require_scored_epoch(quality: QualityCallback, epochs: float) -> None:
    """Raises SettingsError for a warm-up that takes the whole run."""
    if quality.warmup_epochs >= epochs:
        raise SettingsError(
            f"a warm-up of {quality.warmup:g} passes is {quality.warmup_epochs} epochs of {len(quality.data)} rows, "
            f"and the run has {epochs:g}: no scored epoch would be left; lower quality.warmup or raise training.epochs"
        )
