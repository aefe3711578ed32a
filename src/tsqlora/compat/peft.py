"""What tsqlora needs of PEFT that is private or differs between versions."""

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

__all__ = ["dequantize_module_weight"]

Place = tuple[nn.Module, str, str]
"""Where a tensor is: the module that holds it, its name there, and the module's name in the LoRA layer."""

_MARKED = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
_BEFORE = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config")
VARIANTS = tuple(_MARKED or (name for name in _BEFORE if hasattr(LoraConfig, name)))
"""Options of LoraConfig whose update is not s·BA, such as use_dora; PEFT marks them from 0.20 on."""


def has_variant(layer: LoraLayer) -> bool:
    """Whether a LoRA layer adds something else than s·BA: a variant such as DoRA, or a bias."""
    return bool(layer.lora_variant) or any(layer.lora_bias.values())


def places_of(layer: LoraLayer, adapter: str) -> tuple[Place, Place]:
    """Where A and B of a layer's adapter are.

    An Embedding's are entries of a ParameterDict, a linear layer's the weights of two linear layers.
    """
    if adapter in layer.lora_embedding_A:
        return (
            (layer.lora_embedding_A, adapter, "lora_embedding_A"),
            (layer.lora_embedding_B, adapter, "lora_embedding_B"),
        )
    return (
        (layer.lora_A[adapter], "weight", f"lora_A.{adapter}"),
        (layer.lora_B[adapter], "weight", f"lora_B.{adapter}"),
    )


def lora_matrices(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (r × i) and B (o × r) of a layer's adapter, as its forward pass uses them."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)


def _adds_nothing(layer: LoraLayer, adapter: str) -> bool:
    """Whether B is zero; AdaLoRA starts with a zero E in its place."""
    zero = cast(Any, layer).lora_E[adapter] if hasattr(layer, "lora_E") else lora_matrices(layer, adapter)[1]
    return not zero.any()


@contextmanager
def without_zero_updates(model: nn.Module) -> Generator[None]:
    """While open, LoRA layers that add nothing compute their base layer alone: the same numbers, a fifth sooner.

    PEFT's own `disable_adapter` is of no use here: it takes the new head off as well.
    """
    idle = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        and not (layer.disable_adapters or layer.merged_adapters or has_variant(layer))
        and all(_adds_nothing(layer, adapter) for adapter in layer.active_adapters)
    ]
    for layer in idle:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in idle:
            layer._disable_adapters = False


def forget_adapter(layer: LoraLayer, adapter: str) -> None:
    """Takes an adapter off one layer; `delete_adapter` would make another one active in this layer alone."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        by_adapter: Any = getattr(layer, attribute)
        if adapter in by_adapter:
            del by_adapter[adapter]


def allocate_triplets(model: PeftModel, config: AdaLoraConfig, step: int) -> bool:
    """Calls AdaLoRA's `update_and_allocate`; whether the allocator chose triplets at this step.

    PEFT returns nothing, but replaces `rank_pattern` by a new dict whenever it has chosen.
    """
    before = config.rank_pattern
    cast(Any, model.base_model).update_and_allocate(step)
    return config.rank_pattern is not before


def chosen_triplets(config: AdaLoraConfig) -> dict[str, int]:
    """How many triplets the last allocation kept, by the layer's name in the base model; empty before the first.

    A key is `NAME.lora_E.ADAPTER`, and `NAME.lora_E` once the model has been saved.
    """
    return {key.partition(".lora_E")[0]: sum(mask) for key, mask in (config.rank_pattern or {}).items()}


def eva_layer_inputs(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The inputs that EVA reads of a layer: tokens that are not padding, or all rows where a sample is one row."""
    found = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if found.dim() == 2:
        return found.contiguous()
    return prepare_layer_inputs_fn_language_modeling(found, model_input, layer_name)
