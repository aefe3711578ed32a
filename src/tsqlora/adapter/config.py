"""The LoraConfig of a model's targets and heads, and the adapters whose ranks can change."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from peft import LoraConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsqlora.adapter.slots import has_slots
from tsqlora.compat.peft import VARIANTS, lora_matrices
from tsqlora.compat.transformers import packing_method, was_loaded
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import is_linear, lora_layers

_HEADED = re.compile("Classification|QuestionAnswering|MultipleChoice")
"""Words of classes whose head is new for the task."""

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


def new_config(
    model: nn.Module,
    target_modules: str | Sequence[str],
    dropout: float,
    modules_to_save: Sequence[str],
    *,
    kind: type[LoraConfig] = LoraConfig,
    **further: Any,
) -> LoraConfig:
    """A config for these targets, under which the model's head trains whole and is saved."""
    # PEFT copies a module in place: of one inside another it would train a copy that no forward pass calls.
    whole = outermost([*modules_to_save, *heads(model), *_random_linears(model)])
    return kind(
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=dropout,
        modules_to_save=whole or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # PEFT trains and saves the head by it too.
        task_type=TaskType.SEQ_CLS if type(model).__name__.endswith("ForSequenceClassification") else None,
        **further,
    )


def inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with errors that name the setting."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError("the model has adapter layers and is no PeftModel; make it with peft.get_peft_model")
    require_supported_packing(getattr(model, "config", None))
    targets = config.target_modules
    try:
        peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]  (any module will do)
    except ValueError as error:
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        raise SettingsError(f"adapter.target_modules {names}: {error}") from error
    assert isinstance(peft_model, PeftModel)
    return peft_model


def require_supported_packing(config: Any) -> None:
    """Refuse a model whose config says that GPTQ packed its weights."""
    if packing_method(config) == "gptq":
        raise UnsupportedError(
            "the base model is packed by GPTQ, which supports neither ranks nor scores; take the model that it was "
            "made from, with model.quantization 4bit (bitsandbytes)"
        )


def outermost(names: Iterable[str]) -> list[str]:
    """The modules that are not inside another one of these, each once.

    >>> outermost(["classifier.dense", "classifier", "bert.pooler.dense"])
    ['classifier', 'bert.pooler.dense']
    """
    once = list(dict.fromkeys(names))
    return [name for name in once if not any(name.startswith(f"{other}.") for other in once)]


def heads(model: nn.Module) -> list[str]:
    """The modules of a classifier beside its body: what a pretrained checkpoint lacks."""
    if not (isinstance(model, PreTrainedModel) and _HEADED.search(type(model).__name__)):
        return []
    parts = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if model.base_model_prefix in parts:
        return [name for name in parts if name != model.base_model_prefix]
    return parts[-1:]  # the body has another name than its family's, or several; the head comes last


def _random_linears(model: nn.Module) -> list[str]:
    """Linear layers beside the heads that the checkpoint lacked, such as a pooler: they have random weights.

    transformers marks every parameter that it has loaded; a model without marks has none.
    """
    if not any(map(was_loaded, model.parameters())) or getattr(model, "is_quantized", False):
        return []
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    whole = tuple(heads(model))
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not output
        and name.partition(".")[0] not in whole
        and not was_loaded(module.weight)
    ]


def only_adapter(model: PeftModel) -> str:
    """The name of the model's adapter; UnsupportedError unless it is plain LoRA, alone, trainable and not merged."""
    if has_slots(model):
        raise UnsupportedError("the model has rank slots already; wrap it once")
    if len(model.peft_config) != 1:
        remedy = (
            "give a trainer of preferences (DPO and its like), which adds 'ref', the plain model and peft_config="
            "LoraConfig(...)"
            if "ref" in model.peft_config
            else "remove the others: model.delete_adapter(name)"
        )
        raise UnsupportedError(f"ranks change in one adapter, not in {', '.join(model.peft_config)}; {remedy}")
    ((adapter, config),) = model.peft_config.items()
    if config.peft_type != PeftType.LORA:
        raise UnsupportedError(
            f"the adapter is {PeftType(config.peft_type).value}, and ranks change in LoRA alone; use LoraConfig"
        )
    # Initialisations that leave the base weights as they are.
    _require_plain(cast(LoraConfig, config), _NOT_PLAIN, inits=(True, False, "gaussian", "orthogonal", "eva"))
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise UnsupportedError("the adapter is merged into the model; take it out first: model.unmerge_adapter()")
    if not any(p.requires_grad for layer in lora_layers(model).values() for p in lora_matrices(layer, adapter)):
        raise UnsupportedError("the adapter is frozen; load it with PeftModel.from_pretrained(..., is_trainable=True)")
    return adapter


def require_fresh(config: LoraConfig) -> None:
    """Refuse a config that is not plain LoRA of one rank and scale."""
    _require_plain(config, (*_NOT_PLAIN, "rank_pattern", "alpha_pattern"), inits=(True,))


def _require_plain(config: LoraConfig, refused: Sequence[str], *, inits: Sequence[Any]) -> None:
    for name in refused:
        if getattr(config, name):
            raise UnsupportedError(f"LoraConfig({name}=…) is not supported with changing ranks; leave it out")
    if config.init_lora_weights not in inits:
        raise UnsupportedError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) depends on the rank or on the base weights; "
            "leave it out"
        )
