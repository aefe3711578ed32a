"""A PEFT LoRA model whose ranks can change: `wrap`."""

import copy
import math
from collections.abc import Sequence
from typing import cast

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tsqlora.adapter.slots import install
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import lora_layers
from tsqlora.ranks.allocate import Sensitivity, allocate

MEAN_RANK = 8.0
ALPHA = 16.0

_NOT_PLAIN = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "ensure_weight_tying",
    "megatron_config",
)
"""Options of LoraConfig that do not go with changing ranks; variants of LoRA are refused by `lora_layers`."""


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

    Args:
        mean_rank: rank of a uniform LoRA with as many parameters, 8 by default; also the
            budget. May be a fraction: then ranks start at the integers next to it.
        max_rank: slots a layer is built with, twice the mean by default (rounded up).
        alpha: the scale is alpha / mean_rank, for every layer and the whole run. 16 by default.
        config: a LoraConfig instead of all the others but max_rank; its r is the mean rank.

    Raises SettingsError if no module matches; UnsupportedError for options of LoraConfig that
    are not plain LoRA, and for a model that has an adapter already.
    """
    if config is None:
        mean = MEAN_RANK if mean_rank is None else mean_rank
        alpha = ALPHA if alpha is None else alpha
        config = LoraConfig(
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            lora_dropout=dropout,
            modules_to_save=list(modules_to_save) or None,
            exclude_modules=list(modules_to_save) or None,
            task_type=_task_type(model),
        )
    elif mean_rank is None and alpha is None and not dropout and target_modules == "all-linear" and not modules_to_save:
        _require_plain(config)
        config = copy.deepcopy(config)
        mean, alpha = config.r, config.lora_alpha
    else:
        raise SettingsError(
            "wrap takes config=LoraConfig(...) instead of mean_rank, alpha, dropout, target_modules and "
            "modules_to_save; give the one or the others"
        )
    config.r = math.ceil(2 * mean) if max_rank is None else max_rank
    if not 0 < mean <= config.r:
        raise SettingsError(f"ranks.mean is {mean:g}; it must be above 0 and at most ranks.max, {config.r}")
    peft_model = _inject(model, config)
    layers = lora_layers(peft_model)
    shapes = {name: (cast(int, layer.in_features), cast(int, layer.out_features)) for name, layer in layers.items()}
    uniform = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "uniform", 0)
    install(peft_model, allocate(uniform, mean_rank=mean, min_rank=0, max_rank=config.r), scale=alpha / mean)
    return peft_model


def _inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError("the model has an adapter already; merge it first: model = model.merge_and_unload()")
    wanted = config.target_modules
    try:
        peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]  (any module will do)
    except ValueError as error:
        names = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted or ()))
        raise SettingsError(f"adapter.target_modules {names}: {error}") from error
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _require_plain(config: LoraConfig) -> None:
    for name in _NOT_PLAIN:
        if getattr(config, name):
            raise UnsupportedError(f"LoraConfig({name}=…) is not supported with changing ranks; leave it out")
    if config.init_lora_weights is not True:
        raise UnsupportedError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) depends on the rank or on the base weights; "
            "leave it out"
        )


def _task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task, by which it also trains and saves the head."""
    return TaskType.SEQ_CLS if type(model).__name__.endswith("ForSequenceClassification") else None
