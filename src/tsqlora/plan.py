"""What a run will do, before it does it: `--dry-run`, and the record's first page."""

import math
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from tsqlora.adapter.slots import active_parameters, active_ranks, find_slots
from tsqlora.config import Config
from tsqlora.data.tokenise import TokenisedSplit
from tsqlora.errors import SettingsError
from tsqlora.quality.sampling import draw_size
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import used
from tsqlora.ranks.schedule import adjustment_steps


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
    _require_adjustments(config, steps)
    uniform = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "uniform", 0)
    allocate(
        uniform, mean_rank=config.ranks.mean, min_rank=config.ranks.min, max_rank=config.ranks.resolved_max()
    )  # raises where the least ranks cost more than there is
    return {
        "rows": {name: len(split) for name, split in samples.items()},
        "rows_an_epoch": size,
        "epochs": config.training.epochs,
        "steps": steps,
        "passes": passes(config, rows=rows, size=size),
        "ranks": ranks,
        "budget": used(ranks, shapes),
        "trainable": active_parameters(model),
        "bf16": args.bf16,
        "memory_bytes": memory(config, model, longest=max(samples["train"].lengths), bf16=args.bf16),
    }


def passes(config: Config, *, rows: int, size: int) -> dict[str, dict[str, int]]:
    """Rows that go forward and backward in each phase, if the first test finds that the model has learned."""
    quality, epochs = config.quality, config.training.epochs
    if not quality.enabled:
        return {"training": dict.fromkeys(("forward", "backward"), size * epochs)}
    warmup = math.ceil(quality.warmup * rows / size - 1e-9)
    if warmup >= epochs:
        raise SettingsError(
            f"a warm-up of {quality.warmup:g} passes is {warmup} epochs of {size} rows, and the run has {epochs}: "
            "no scored epoch would be left; lower quality.warmup or raise training.epochs"
        )
    reference = min(quality.reference, rows)
    forward = 2 if quality.resolved_weights()["loss_reduction"] else 1
    return {
        "warm-up": dict.fromkeys(("forward", "backward"), size * warmup),
        "scoring": {"forward": rows * forward + 2 * reference, "backward": rows + reference},
        "ranks": dict.fromkeys(("forward", "backward"), min(config.ranks.samples, size)),
        "training": dict.fromkeys(("forward", "backward"), size * (epochs - warmup)),
    }


def memory(config: Config, model: PeftModel, *, longest: int, bf16: bool) -> int:
    """A rough peak of training in bytes: weights, gradients and moments, linear layers' activations."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    features = sum(inputs + 2 * outputs for inputs, outputs in (s.shape for s in find_slots(model).values()))
    return weights + trained + config.training.batch_size * longest * features * (2 if bf16 else 4)


def _require_adjustments(config: Config, steps: int) -> None:
    ranks = config.ranks
    if ranks.policy == "fixed":
        return
    interval = max(10, steps // 20) if ranks.interval is None else ranks.interval
    if len(adjustment_steps(steps, interval=interval, warmup=ranks.warmup, freeze=ranks.freeze)) == 0:
        raise SettingsError(
            f"no adjustment fits into {steps} steps with ranks.interval {interval}, ranks.warmup {ranks.warmup:g} "
            f"and ranks.freeze {ranks.freeze:g}; lower them, train longer, or use ranks.policy fixed"
        )
