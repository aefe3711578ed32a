"""Start training from an adapter: its ranks, weights and heads."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load
from torch import nn

from tsqlora.adapter.config import inject, new_config
from tsqlora.errors import DataError, UnsupportedError
from tsqlora.interop.base import module_shapes
from tsqlora.interop.files import PREFIX, config_for, read_adapter, tensors_of
from tsqlora.interop.health import require_finite
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.rewrite import commonest_scale, folded, require_fits, require_plain
from tsqlora.interop.tensors import to_bytes


def read_start(folder: Path) -> LoraAdapter:
    """Read the adapter in a directory, at one scale: other scales are folded into B.

    Raises UnsupportedError if it is not plain LoRA, DataError for numbers that are not finite, and as `read_adapter`.
    """
    adapter = read_adapter(folder)
    require_plain(adapter, "a training that goes on")
    require_finite(adapter)
    targets = {name: target for name, target in adapter.targets.items() if target.rank}
    for name, target in targets.items():
        if target.kind == "convolution":
            raise UnsupportedError(f"{name} is a convolution, on which tsqlora does not train; export it as merged")
    if not targets:
        raise DataError(f"{folder}: every layer has rank 0, so there is nothing to continue from")
    scale = commonest_scale(targets.values())
    return replace(adapter, targets={name: folded(target, scale) for name, target in targets.items()})


def scale_of_all(adapter: LoraAdapter) -> float:
    """The scale of an adapter from `read_start`."""
    return next(iter(adapter.targets.values())).scale


def mean_rank(adapter: LoraAdapter) -> float:
    """The rank of a uniform LoRA on the same layers with as many parameters."""
    return adapter.parameters / sum(target.inputs + target.outputs for target in adapter.targets.values())


def start_from(model: nn.Module, adapter: LoraAdapter, *, dropout: float, modules_to_save: Sequence[str]) -> PeftModel:
    """The model, changed in place, with the adapter and the heads that came with it; no slots yet.

    Args:
        modules_to_save: that train whole beside those of the adapter.

    Raises DataError if the adapter belongs to another base, or its head to other classes.
    """
    shapes = module_shapes(model)
    for name, target in adapter.targets.items():
        require_fits(name, target, shapes)
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.saved.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise DataError(f"the adapter came with {name}, which the model lacks; give the adapter's base")
        if parameter.shape != tensor.shape:
            raise DataError(
                f"the adapter came with {name} of shape {tuple(tensor.shape)}, here it is {tuple(parameter.shape)}: "
                "its head was trained on other classes; give rows of the same, or merge it and train the model"
            )
    patterns = config_for(adapter)
    came = patterns["modules_to_save"] or []
    new = [name for name in modules_to_save if not any(f".{name}".endswith(f".{other}") for other in came)]
    config = new_config(
        model,
        patterns["target_modules"],
        dropout,
        [*came, *new],
        **{key: patterns[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")},
    )
    peft_model = inject(model, config)
    # PEFT needs every module's weights: a new head keeps its own.
    stored = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    came_with = load(to_bytes(tensors_of(replace(adapter, base_layers={}))))
    stored |= {f"{PREFIX}{name}": tensor for name, tensor in came_with.items()}
    if unknown := set_peft_model_state_dict(peft_model, stored).unexpected_keys:
        raise DataError(f"the adapter has {unknown[0]}, which the model lacks; give the adapter's base")
    return peft_model
