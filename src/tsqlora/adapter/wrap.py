"""A PEFT LoRA model whose ranks can change: `wrap`."""

import copy
import math
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tsqlora.adapter.slots import install
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import lora_layers
from tsqlora.ranks.allocate import Sensitivity, allocate

_PLAIN_ONLY = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication")


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
        config: a LoraConfig instead of all the others; its r is the mean rank.

    Raises SettingsError if no module matches; UnsupportedError for options of LoraConfig that
    are not plain LoRA.
    """
    if config is not None and mean_rank is not None:
        raise SettingsError("give wrap either config=LoraConfig(...), whose r is the mean rank, or mean_rank")
    mean = float(config.r if config is not None else 8 if mean_rank is None else mean_rank)
    capacity = math.ceil(2 * mean) if max_rank is None else max_rank
    if not 0 < mean <= capacity:
        raise SettingsError(f"mean rank is {mean:g}; it must be above 0 and at most the maximum, {capacity}")
    if config is None:
        config = LoraConfig(
            lora_alpha=16 if alpha is None else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            modules_to_save=list(modules_to_save) or None,
            exclude_modules=list(modules_to_save) or None,
            task_type=_task_type(model),
        )
    _require_plain(config)
    config = copy.deepcopy(config)
    scale = config.lora_alpha / mean
    config.r = capacity
    peft_model = _inject(model, config)
    shapes = {n: (layer.in_features, layer.out_features) for n, layer in lora_layers(peft_model).items()}
    uniform = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "uniform", 0)
    install(peft_model, allocate(uniform, mean_rank=mean, min_rank=0, max_rank=capacity), scale=scale)
    return peft_model


def _inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    try:
        peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise SettingsError(f"adapter.target_modules {config.target_modules!r}: {error}") from error
    if not any(isinstance(m, LoraLayer) for m in peft_model.modules()):
        raise SettingsError(f"adapter.target_modules {config.target_modules!r} matches no module of the model")
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _require_plain(config: LoraConfig) -> None:
    for name in _PLAIN_ONLY:
        if getattr(config, name, None):
            raise UnsupportedError(f"LoraConfig({name}=…) is not supported with changing ranks; leave it out")
    if config.init_lora_weights not in (True, "gaussian", "orthogonal"):
        raise UnsupportedError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) fixes ranks or base weights; "
            "use True, 'gaussian' or 'orthogonal'"
        )


def _task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task, by which it also trains and saves the head."""
    return TaskType.SEQ_CLS if type(model).__name__.endswith("ForSequenceClassification") else None
