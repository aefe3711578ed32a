"""The table of baselines, and the short ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tsqlora.adapter.slots import layers_of
from tsqlora.baselines.adalora import adalora
from tsqlora.baselines.elalora import elalora
from tsqlora.baselines.eva import eva
from tsqlora.baselines.setup import Built, Setup, adapt, count_trainable
from tsqlora.errors import UnsupportedError
from tsqlora.ranks.baselines import whole_rank


def full(setup: Setup) -> Built:
    """Train the whole pretrained model: no adapter, no ranks."""
    require_trainable(setup.pretrained.model)
    model = setup.pretrained.model.requires_grad_(True)
    return Built(model, (), trainable=lambda: count_trainable(model), ranks=dict)


def lora(setup: Setup) -> Built:
    """PEFT's LoRA at uniform rank, scaled by alpha / rank."""
    return _uniform(setup, "lora")


def rslora(setup: Setup) -> Built:
    """LoRA scaled by alpha / √rank.  Kalajdzievski (2023), arXiv 2312.03732; PEFT's."""
    return _uniform(setup, "rslora", use_rslora=True)


def dora(setup: Setup) -> Built:
    """LoRA of the weights' directions, their magnitudes trained apart.  Liu et al. (2024), arXiv 2402.09353; PEFT's."""
    return _uniform(setup, "dora", use_dora=True)


def _uniform(setup: Setup, name: str, **options: Any) -> Built:
    model = adapt(setup, r=whole_rank(setup.mean_rank, name), lora_alpha=setup.alpha, **options)
    return Built(
        model,
        (),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: layer.r["default"] for name, layer in layers_of(model).items()},
    )


BASELINES: dict[str, Callable[[Setup], Built]] = {
    "full": full,
    "lora": lora,
    "rslora": rslora,
    "dora": dora,
    "adalora": adalora,
    "elalora": elalora,
    "eva": eva,
}


def require_trainable(model: nn.Module) -> None:
    """Raises UnsupportedError for weights that cannot train whole: packed ones, and those in half precision.

    A step of AdamW is about as long as the learning rate, and half precision rounds most such steps away. The adapters
    of other methods are float32, whatever the base is.
    """
    if getattr(model, "is_quantized", False):
        by: Any = model.quantization_method
        raise UnsupportedError(
            f"full trains the base's own weights, and these are packed by {getattr(by, 'value', by)}; set "
            "model.quantization to null, and model.path to a base whose weights are whole, or leave out full"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise UnsupportedError(
                f"full trains the base's own weights, and {name} is {str(parameter.dtype).removeprefix('torch.')}, "
                "which rounds small steps away; set model.dtype to float32, and training.bf16 to true for speed, or "
                "leave out full"
            )
