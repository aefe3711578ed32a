"""A PEFT LoRA model whose ranks can change: `wrap`."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsqlora.adapter.plain import only_adapter, require_fresh
from tsqlora.adapter.slots import install
from tsqlora.compat.bitsandbytes import keep_as_trained
from tsqlora.compat.transformers import packing_method, was_loaded
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.layers import is_linear
from tsqlora.gradients.sites import lora_layers
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import Shapes, costs, default_max_rank, used

MEAN_RANK = 8.0
ALPHA = 16.0

_HEADED = re.compile("Classification|QuestionAnswering|MultipleChoice")
"""In a class's name: a model with a head that is new for its task."""


def wrap(
    model: nn.Module,
    *,
    mean_rank: float | None = None,
    max_rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    config: LoraConfig | None = None,
) -> PeftModel:
    """A PeftModel with LoRA in every target, at uniform rank, whose ranks `RankCallback` moves.

    A classifier's head trains whole and is saved: in a transformers model for classification,
    question answering or multiple choice, all that lies beside its body. So is a linear layer
    that the checkpoint lacked, such as a pooler, where transformers' `from_pretrained` has made the model.

    Of a PeftModel with one LoRA adapter, fresh or trained, the same object: its weights stay
    as they are, its ranks become changeable, and its mean rank and scale are kept.

    Args:
        mean_rank: rank of a uniform LoRA with as many parameters, 8 by default; also the
            budget. May be a fraction: then ranks start at the integers next to it.
        max_rank: slots a layer is built with, twice the mean by default (rounded up).
        alpha: the scale is alpha / mean_rank, for every layer and the whole run. 16 by default.
        target_modules: names or endings of names of linear layers and embeddings, or
            "all-linear": every linear layer but heads and the output embedding.
        modules_to_save: further modules that train whole, without LoRA.
        config: a LoraConfig instead of all the others but max_rank; its r is the mean rank.
            Then what it says of heads holds, and nothing is added.

    Raises SettingsError if no module matches; UnsupportedError for options of LoraConfig that
    are not plain LoRA, and for adapters that are not one plain LoRA of one scale.
    """
    options = (mean_rank, alpha, dropout, target_modules, tuple(modules_to_save))
    given = options != (None, None, 0.0, "all-linear", ())
    if isinstance(model, PeftModel):
        if given or config is not None:
            raise SettingsError("the model has an adapter, which says all but max_rank itself; leave out the others")
        return _adopt(model, max_rank)
    if config is None:
        mean = MEAN_RANK if mean_rank is None else mean_rank
        config = new_config(model, target_modules, dropout, modules_to_save)
        return _build(model, config, mean, max_rank, alpha=ALPHA if alpha is None else alpha, divisor=mean)
    if given:
        raise SettingsError(
            "wrap takes config=LoraConfig(...) instead of mean_rank, alpha, dropout, target_modules and "
            "modules_to_save; give the one or the others"
        )
    require_fresh(config)
    divisor = config.r**0.5 if config.use_rslora else config.r
    return _build(model, copy.deepcopy(config), config.r, max_rank, alpha=config.lora_alpha, divisor=divisor)


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
    whole = list(dict.fromkeys([*modules_to_save, *heads(model), *_random_linears(model)]))
    return kind(
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=dropout,
        modules_to_save=whole or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=_task_type(model),
        **further,
    )


def _build(
    model: nn.Module, config: LoraConfig, mean: float, max_rank: int | None, *, alpha: float, divisor: float
) -> PeftModel:
    """A new adapter at its capacity, of which uniform ranks are active; its scale is alpha / divisor."""
    config.r = default_max_rank(mean) if max_rank is None else max_rank
    if not 0 < mean <= config.r:
        raise SettingsError(f"ranks.mean is {mean:g}; it must be above 0 and at most ranks.max, {config.r}")
    peft_model = inject(model, config)
    layers = lora_layers(peft_model)
    for layer in layers.values():
        layer.scaling["default"] = alpha / divisor
    uniform = Sensitivity(dict.fromkeys(layers, 1.0), _shapes(layers), "uniform", 0)
    ranks = allocate(uniform, mean_rank=mean, min_rank=0, max_rank=config.r)
    return _with_slots(peft_model, ranks, capacity=config.r)


def inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with errors that name the setting."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError("the model has adapter layers and is no PeftModel; make it with peft.get_peft_model")
    require_supported_packing(getattr(model, "config", None))
    wanted = config.target_modules
    try:
        peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]  (any module will do)
    except ValueError as error:
        names = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted or ()))
        raise SettingsError(f"adapter.target_modules {names}: {error}") from error
    assert isinstance(peft_model, PeftModel)
    return peft_model


def require_supported_packing(config: Any) -> None:
    """Raises UnsupportedError for a model whose config says that its weights are packed by GPTQ."""
    if packing_method(config) == "gptq":
        raise UnsupportedError(
            "the base model is packed by GPTQ, over which ranks and scores are not supported; take the model it was "
            "made from, with model.quantization 4bit (bitsandbytes)"
        )


def _adopt(model: PeftModel, max_rank: int | None) -> PeftModel:
    """Slots for an adapter that is there: its weights first, zeros up to the capacity."""
    adapter = only_adapter(model)
    # A copy: PEFT keeps the user's own config, with which other models may be made.
    model.peft_config[adapter] = copy.deepcopy(model.peft_config[adapter])
    layers = lora_layers(model)
    scales = {name: layer.scaling[adapter] for name, layer in layers.items()}
    (low, least), (high, most) = (pick(scales.items(), key=lambda item: item[1]) for pick in (min, max))
    if not math.isclose(least, most, rel_tol=1e-9):
        raise UnsupportedError(
            f"the adapter's scale lora_alpha / r is {least:g} in {low} and {most:g} in {high}; changing ranks need one "
            "scale: set alpha_pattern by rank_pattern"
        )
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    shapes = _shapes(layers)
    largest = max(ranks, key=lambda name: ranks[name])
    mean = used(ranks, shapes) / sum(costs(shapes).values())
    capacity = default_max_rank(mean, least=ranks[largest]) if max_rank is None else max_rank
    if capacity < ranks[largest]:
        raise SettingsError(f"max_rank is {capacity}, and {largest} has rank {ranks[largest]}; raise max_rank")
    return _with_slots(model, ranks, capacity=capacity)


def _with_slots(model: PeftModel, ranks: Mapping[str, int], *, capacity: int) -> PeftModel:
    keep_as_trained(model)
    install(model, ranks, capacity=capacity)
    return model


def _shapes(layers: dict[str, LoraLayer]) -> Shapes:
    return {name: (cast(int, layer.in_features), cast(int, layer.out_features)) for name, layer in layers.items()}


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

    transformers marks every parameter that it has loaded; of a model without any mark nothing is known.
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


def _task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task, by which it also trains and saves the head."""
    return TaskType.SEQ_CLS if type(model).__name__.endswith("ForSequenceClassification") else None
