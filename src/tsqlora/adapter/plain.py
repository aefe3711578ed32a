"""Checks that an adapter can change its ranks: plain s·BA, the only one of its model."""

from collections.abc import Sequence
from typing import Any, cast

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from tsqlora.adapter.slots import has_slots
from tsqlora.compat.peft import VARIANTS, lora_matrices
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.sites import lora_layers

_PATTERNS = ("rank_pattern", "alpha_pattern")
_NOT_PLAIN = (
    *VARIANTS,
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "ensure_weight_tying",
    "megatron_config",
)
"""Options of LoraConfig that changing ranks do not support: variants of LoRA, and parts outside s·BA."""

_INITS_OF_THE_ADAPTER_ALONE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that do not change the base weights."""


def only_adapter(model: PeftModel) -> str:
    """The name of the model's adapter, if that is plain LoRA, alone, trainable and not merged."""
    if has_slots(model):
        raise UnsupportedError("the model has rank slots already; wrap it once")
    if len(model.peft_config) > 1 and "ref" in model.peft_config:
        raise UnsupportedError(
            "the model has the adapter 'ref', which trainers of preferences (DPO and its like) add to a PeftModel of "
            "yours for their reference; give the trainer the plain model, and peft_config=LoraConfig(...)"
        )
    if len(model.peft_config) != 1:
        raise UnsupportedError(
            f"the model has the adapters {', '.join(model.peft_config)}, and ranks change in one; remove the others: "
            "model.delete_adapter(name)"
        )
    ((adapter, config),) = model.peft_config.items()
    if config.peft_type != PeftType.LORA:
        raise UnsupportedError(
            f"the adapter is {PeftType(config.peft_type).value}, and ranks change in LoRA alone; use LoraConfig"
        )
    _require_plain(cast(LoraConfig, config), refused=_NOT_PLAIN, inits=_INITS_OF_THE_ADAPTER_ALONE)
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise UnsupportedError("the adapter is merged into the model; take it out first: model.unmerge_adapter()")
    if not any(p.requires_grad for layer in lora_layers(model).values() for p in lora_matrices(layer, adapter)):
        raise UnsupportedError("the adapter is frozen; load it with PeftModel.from_pretrained(..., is_trainable=True)")
    return adapter


def require_fresh(config: LoraConfig) -> None:
    """Refuse a config that is not plain LoRA of one rank and scale."""
    _require_plain(config, refused=(*_NOT_PLAIN, *_PATTERNS), inits=(True,))


def _require_plain(config: LoraConfig, *, refused: Sequence[str], inits: Sequence[Any]) -> None:
    for name in refused:
        if getattr(config, name):
            raise UnsupportedError(f"LoraConfig({name}=…) is not supported with changing ranks; leave it out")
    if config.init_lora_weights not in inits:
        raise UnsupportedError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) depends on the rank or on the base weights; "
            "leave it out"
        )
