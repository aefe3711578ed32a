"""The table of rival methods, and those of them that need no file of their own."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from tsqlora.baselines.adalora import adalora
from tsqlora.baselines.elalora import elalora, elalora_as_released
from tsqlora.baselines.eva import eva, require_directions, require_one_stack
from tsqlora.baselines.prune import prune
from tsqlora.baselines.setup import Built, Setup, adapt, count_trainable, layers_of
from tsqlora.baselines.svd import require_penalty
from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.ranks.baselines import change_phase, elalora_steps, whole_rank


def full(setup: Setup) -> Built:
    """The pretrained model, all of which trains: no adapter, no ranks."""
    require_trainable(setup.pretrained.model)
    model = setup.pretrained.model.requires_grad_(True)
    return Built(model, (), trainable=lambda: count_trainable(model), ranks=dict)


def lora(setup: Setup) -> Built:
    """PEFT's LoRA at uniform rank, scaled by alpha / rank."""
    return _uniform(adapt(setup, r=whole_rank(setup.mean_rank, "lora"), lora_alpha=setup.alpha))


def rslora(setup: Setup) -> Built:
    """LoRA scaled by alpha / √rank.  Kalajdzievski (2023), arXiv 2312.03732; PEFT's."""
    rank = whole_rank(setup.mean_rank, "rslora")
    return _uniform(adapt(setup, r=rank, lora_alpha=setup.alpha, use_rslora=True))


def dora(setup: Setup) -> Built:
    """LoRA of the weights' directions, their magnitudes trained apart.  Liu et al. (2024), arXiv 2402.09353; PEFT's."""
    rank = whole_rank(setup.mean_rank, "dora")
    return _uniform(adapt(setup, r=rank, lora_alpha=setup.alpha, use_dora=True))


def _uniform(model: PeftModel) -> Built:
    return Built(
        model,
        (),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: layer.r["default"] for name, layer in layers_of(model).items()},
    )


RIVALS: dict[str, Callable[[Setup], Built]] = {
    "full": full,
    "lora": lora,
    "rslora": rslora,
    "dora": dora,
    "adalora": adalora,
    "elalora": elalora,
    "elalora-as-released": elalora_as_released,
    "eva": eva,
    "prune": prune,
}


def require_rival(
    name: str,
    *,
    mean_rank: float,
    max_rank: int,
    steps: int,
    rows: int,
    batch_size: int,
    label_smoothing: float,
    model: nn.Module,
) -> None:
    """Raises what building the method's model and beginning its training would, as far as nothing need be built.

    `model` is the pretrained one.
    """
    if name == "full":
        require_trainable(model)
        return
    rank = whole_rank(mean_rank, name)
    if name == "eva":
        require_one_stack(model)
        require_directions(rank, max_rank, rows=rows, batch_size=batch_size)
    if name in ("adalora", "prune"):
        change_phase(steps, method=name)
    if name in ("elalora", "elalora-as-released"):
        elalora_steps(steps)
    if name in ("adalora", "elalora", "elalora-as-released", "prune"):
        require_penalty(label_smoothing, name)


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


def get_rival(name: str) -> Callable[[Setup], Built]:
    """The builder of that name; SettingsError for an unknown name."""
    if name not in RIVALS:
        raise SettingsError(f"method '{name}' is unknown; {nearest(name, RIVALS)}")
    return RIVALS[name]
