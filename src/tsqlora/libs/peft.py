"""Interfaces of PEFT that are private or differ between versions."""

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

__all__ = ["dequantize_module_weight"]

Place = tuple[nn.Module, str, str]
"""A tensor's module, its name there, and the module's name in the LoRA layer."""

_MARKED = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
_BEFORE = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config")
VARIANTS = tuple(_MARKED or (name for name in _BEFORE if hasattr(LoraConfig, name)))
"""Options of LoraConfig whose update is not s·BA, such as use_dora; PEFT 0.20 and later mark them."""


def has_variant(layer: LoraLayer) -> bool:
    """Whether a LoRA layer adds more than s·BA: a variant such as DoRA, or a bias."""
    return bool(layer.lora_variant) or any(layer.lora_bias.values())


def places_of(layer: LoraLayer, adapter: str) -> tuple[Place, Place]:
    """The places of A and B: entries of a ParameterDict for an Embedding, else weights of two linear layers."""
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
    """A (r × i) and B (o × r) of a layer's adapter."""
    (a, name_a, _), (b, name_b, _) = places_of(layer, adapter)
    return getattr(a, name_a), getattr(b, name_b)


def _adds_nothing(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer lacks the adapter, or its B is zero; AdaLoRA starts with a zero E in its place."""
    if adapter not in layer.r:
        return True
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
    """Remove an adapter from one layer; `delete_adapter` would activate another one in this layer alone."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        by_adapter: Any = getattr(layer, attribute)
        if adapter in by_adapter:
            del by_adapter[adapter]
