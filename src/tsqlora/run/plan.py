"""What a run will do, before it does it: `--dry-run`, and the record's first page."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from tsqlora.adapter.slots import active_parameters, active_ranks, find_slots
from tsqlora.data.samples import TokenisedSplit
from tsqlora.errors import SettingsError
from tsqlora.gradients.sites import lora_layers
from tsqlora.quality.asked import PAPER_TERMS, wanted_terms
from tsqlora.quality.sampling import draw_size
from tsqlora.ranks import schedule
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import used
from tsqlora.run.config import Config, QualitySettings, Section
from tsqlora.tasks import get_task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.training.cost import scoring_passes

BYTES_A_ROW = 500
"""Of a row that is scored: hash, place, length, terms and predictions, twice while they are written."""
BYTES_A_TOKEN = 12
"""Of a row that is scored, on disk: its id, its mask and its segment."""


def plan(
    config: Config, model: PeftModel, samples: Mapping[str, TokenisedSplit], args: TrainingArguments
) -> dict[str, Any]:
    """Samples, steps, budget, ranks at the start, passes by phase, and a memory estimate.

    Raises SettingsError for what could not be carried out: no epoch left after the warm-up,
    no step at which ranks may change, a budget below the least ranks.
    """
    ranks = active_ranks(model)
    shapes = {name: slots.shape for name, slots in find_slots(model).items()}
    rows = len(samples["train"])
    size = draw_size(rows, config.quality.fraction)
    batches = math.ceil(size / (args.train_batch_size * args.world_size))
    steps = math.ceil(batches / args.gradient_accumulation_steps) * config.training.epochs
    require_adjustments(config, steps)
    uniform = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "uniform", 0)
    allocate(
        uniform, mean_rank=config.ranks.mean, min_rank=config.ranks.min, max_rank=config.ranks.resolved_max()
    )  # raises where the least ranks cost more than there is
    return {
        "rows": {name: len(split) for name, split in samples.items()},
        "classes": classes(config, model, samples["train"]),
        "rows_an_epoch": size,
        "epochs": config.training.epochs,
        "steps": steps,
        "passes": passes(config, rows=rows, size=size),
        "ranks": ranks,
        "budget": used(ranks, shapes),
        "trainable": active_parameters(model),
        "bf16": args.bf16,
        "memory_bytes": memory(config, model, longest=max(samples["train"].lengths), bf16=args.bf16),
        "without_effect": without_effect(config),
    }


def without_effect(config: Config) -> list[str]:
    """Settings that are not their default and count for nothing beside the others, each group with the reason."""
    q, ranks = config.quality, config.ranks
    gradients = any(term.gradient for term in wanted_terms(q.weighted_terms()).values())
    found = list[tuple[str, Section, Iterable[str], str]]()
    if not q.enabled:
        idle = [name for name in QualitySettings.model_fields if name not in {"enabled", "fraction", "resample"}]
        found += [("quality", q, idle, "quality.enabled is false"), ("ranks", ranks, ["samples"], "nothing is scored")]
    elif not gradients:
        found.append(("quality", q, ["scope", "guard"], "no term of Q that has a weight is of gradients"))
    if ranks.policy == "fixed":
        idle = ["interval", "warmup", "freeze", "moves", *([] if q.enabled else ["estimator", "gamma"])]
        found.append(("ranks", ranks, idle, "ranks.policy is fixed"))
    bars = config.training.further_arguments().get("disable_tqdm", True)
    changed = (([f"{of}.{name}" for name in _changed(section, idle)], why) for of, section, idle, why in found)
    told = [f"{', '.join(names)} without effect: {why}" for names, why in changed if names]
    return told if bars else [*told, "training.disable_tqdm without effect: tsqlora shows progress itself, on stderr"]


def _changed(section: Section, names: Iterable[str]) -> list[str]:
    """Those of the settings that are not as they are by default."""
    return [name for name in names if getattr(section, name) != getattr(type(section)(), name)]


def classes(config: Config, model: PeftModel, rows: TokenisedSplit) -> dict[str, int] | None:
    """Rows of each class, by its name; None where there are no classes."""
    if not isinstance(get_task(config.task.type), Classification):
        return None
    counts = Counter(rows.labels.tolist())
    return {str(name): counts[j] for j, name in model.config.id2label.items()}


def scoring_plan(config: Config, model: PeftModel, *, rows: int, max_length: int, warmup: bool) -> dict[str, Any]:
    """Rows, batches, passes by phase, and bounds of memory and disk; with `warmup` it is trained first.

    Raises SettingsError for a warm-up that is longer than the run.
    """
    q = config.quality
    known = passes(config, rows=rows, size=draw_size(rows, q.fraction))
    scoring = _scoring_passes(config, (*PAPER_TERMS, *q.weighted_terms()), rows=rows)
    return {
        "rows": rows,
        "batches": math.ceil(rows / config.training.batch_size),
        "passes": ({"warm-up": known["warm-up"]} if warmup else {}) | {"scoring": scoring},
        "memory_bytes": memory(config, model, longest=max_length, bf16=False) + rows * BYTES_A_ROW,
        "disk_bytes": rows * max_length * BYTES_A_TOKEN,
    }


def passes(config: Config, *, rows: int, size: int) -> dict[str, dict[str, int]]:
    """Rows that go forward and backward in each phase, if the first test finds that the model has learned."""
    quality, epochs = config.quality, config.training.epochs
    if not quality.enabled:
        return {"training": dict.fromkeys(("forward", "backward"), size * epochs)}
    warmup = warmup_epochs(quality.warmup, rows=rows, size=size)
    if warmup >= epochs:
        raise SettingsError(
            f"a warm-up of {quality.warmup:g} passes is {warmup} epochs of {size} rows, and the run has {epochs}: "
            "no scored epoch would be left; lower quality.warmup or raise training.epochs"
        )
    return {
        "warm-up": dict.fromkeys(("forward", "backward"), size * warmup),
        "scoring": _scoring_passes(config, quality.weighted_terms(), rows=rows),
        "ranks": dict.fromkeys(("forward", "backward"), min(config.ranks.samples, size)),
        "training": dict.fromkeys(("forward", "backward"), size * (epochs - warmup)),
    }


def _scoring_passes(config: Config, asked: Iterable[str], *, rows: int) -> dict[str, int]:
    """Rows forward and backward in one scoring that has these terms."""
    reference = min(config.quality.reference, rows)
    text = isinstance(get_task(config.task.type), Generation)
    cost = scoring_passes(wanted_terms(asked).values(), text=text).cost(rows, reference)
    return {"forward": cost.forward, "backward": cost.backward}


def warmup_epochs(passes: float, *, rows: int, size: int) -> int:
    """Epochs of `size` rows that so many passes over all rows take."""
    return math.ceil(passes * rows / size - 1e-9)


def memory(config: Config, model: PeftModel, *, longest: int, bf16: bool) -> int:
    """A rough peak of training in bytes: weights, gradients and moments, linear layers' activations."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers: list[Any] = list(lora_layers(model).values())
    features = sum(layer.in_features + 2 * layer.out_features for layer in layers)
    if isinstance(get_task(config.task.type), Generation):
        features += 3 * int(getattr(model.config, "vocab_size", 0))  # logits, in float32 once more, and their gradient
    return weights + trained + config.training.batch_size * longest * features * (2 if bf16 else 4)


def require_adjustments(config: Config, steps: int) -> None:
    """Raises SettingsError for a run in which ranks were to move and would not."""
    ranks = config.ranks
    if ranks.policy == "fixed":
        return
    schedule.require_adjustments(steps, interval=ranks.interval, warmup=ranks.warmup, freeze=ranks.freeze)
