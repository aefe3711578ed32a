"""Other methods, each built by one function for a stock Trainer: what `compare` compares with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tsqlora.adapter.slots import active_ranks
from tsqlora.baselines.setup import Built, Setup, adapt, count_trainable, whole_rank
from tsqlora.baselines.triplets import adalora, elalora
from tsqlora.errors import UnsupportedError

__all__ = ["BASELINES", "Built", "Setup"]


def full(setup: Setup) -> Built:
    """Train the whole pretrained model: no adapter, no ranks.

    Refuses packed weights, and weights in half precision, which rounds most steps of AdamW away.
    """
    model = setup.pretrained.model
    if getattr(model, "is_quantized", False):
        raise UnsupportedError(
            "full trains the base's own weights, and these are packed; set model.quantization to null, and model.path "
            "to a base whose weights are not, or leave out full"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise UnsupportedError(
                f"full trains the base's own weights, and {name} is {parameter.dtype}; set "
                "model.dtype to float32, and training.bf16 to true for speed, or leave out full"
            )
    model.requires_grad_(True)
    return Built(model, (), trainable=lambda: count_trainable(model), ranks=dict)


def uniform(setup: Setup, *, name: str, **options: Any) -> Built:
    """PEFT's LoRA at uniform rank, scaled by alpha / rank, with further options of LoraConfig."""
    model = adapt(setup, r=whole_rank(setup.mean_rank, name), lora_alpha=setup.alpha, **options)
    return Built(model, (), trainable=lambda: count_trainable(model), ranks=lambda: active_ranks(model))


BASELINES: dict[str, Callable[[Setup], Built]] = {
    "full": full,
    "lora": partial(uniform, name="lora"),
    # Scaled by alpha / √rank: Kalajdzievski (2023), arXiv 2312.03732.
    "rslora": partial(uniform, name="rslora", use_rslora=True),
    # LoRA of the weights' directions, their magnitudes trained apart: Liu et al. (2024), arXiv 2402.09353.
    "dora": partial(uniform, name="dora", use_dora=True),
    "adalora": adalora,
    "elalora": elalora,
}
