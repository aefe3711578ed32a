"""What a run will do, before it does it: `--dry-run`, and the record's first page."""

import math
from typing import Any

from peft import PeftModel

from tsqlora.adapter.slots import active_parameters, active_ranks
from tsqlora.config import Config
from tsqlora.data.tokenise import TokenisedSplit
from tsqlora.gradients.sites import lora_layers
from tsqlora.quality.sampling import draw_size
from tsqlora.ranks.budget import used


def plan(config: Config, model: PeftModel, samples: dict[str, TokenisedSplit], *, bf16: bool) -> dict[str, Any]:
    """Samples, steps, budget, ranks at the start, passes by phase, and a memory estimate."""
    ranks = active_ranks(model)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in lora_layers(model).items()}
    rows, training = len(samples["train"]), config.training
    size = draw_size(rows, config.quality.fraction)
    accumulation = int(training.further_arguments().get("gradient_accumulation_steps", 1))
    return {
        "rows": {name: len(split) for name, split in samples.items()},
        "rows_an_epoch": size,
        "epochs": training.epochs,
        "steps": math.ceil(math.ceil(size / training.batch_size) / accumulation) * training.epochs,
        "passes": passes(config, rows=rows, size=size),
        "ranks": ranks,
        "budget": used(ranks, shapes),
        "trainable": active_parameters(model),
        "bf16": bf16,
        "memory_bytes": memory(config, model, longest=max(samples["train"].lengths), bf16=bf16),
    }


def passes(config: Config, *, rows: int, size: int) -> dict[str, dict[str, int]]:
    """Rows that go forward and backward in each phase."""
    quality = config.quality
    total = size * config.training.epochs
    if not quality.enabled:
        return {"training": {"forward": total, "backward": total}}
    warmup = size * math.ceil(quality.warmup * rows / size - 1e-9)
    reference = min(quality.reference, rows)
    looks_ahead = quality.resolved_weights()["loss_reduction"] != 0
    return {
        "warm-up": {"forward": warmup, "backward": warmup},
        "scoring": {"forward": rows * (1 + looks_ahead) + 2 * reference, "backward": rows + reference},
        "ranks": dict.fromkeys(("forward", "backward"), min(config.ranks.samples, size)),
        "training": {"forward": total - warmup, "backward": total - warmup},
    }


def memory(config: Config, model: PeftModel, *, longest: int, bf16: bool) -> int:
    """A rough peak of training in bytes: weights, gradients and moments, linear layers' activations."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    features = sum(layer.in_features + 2 * layer.out_features for layer in lora_layers(model).values())
    return weights + trained + config.training.batch_size * longest * features * (2 if bf16 else 4)
