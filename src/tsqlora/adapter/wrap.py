"""A PEFT LoRA model: with slots, so that its ranks can change (`wrap`), plain, or from an adapter that exists."""

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsqlora.adapter.slots import finalize, has_slots, install, layer_shapes, layers_of
from tsqlora.compat.peft import VARIANTS, lora_matrices
from tsqlora.compat.transformers import packing_method, transformer_blocks, was_loaded
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.gradients.sites import is_linear, lora_layers
from tsqlora.interop.base import module_shapes
from tsqlora.interop.files import PREFIX, config_for, read_adapter, tensors_of
from tsqlora.interop.health import require_finite
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.patterns import alpha_for
from tsqlora.interop.rewrite import commonest_scale, folded, require_fits, require_plain
from tsqlora.interop.tensors import to_bytes
from tsqlora.ranks.allocate import Sensitivity, allocate, costs, default_max_rank, used

MEAN_RANK = 8.0
ALPHA = 16.0


def wrap(
    model: nn.Module,
    *,
    mean_rank: float | None = None,
    max_rank: int | None = None,
    depth: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    config: LoraConfig | None = None,
) -> PeftModel:
    """Build a PeftModel with LoRA in every target, at uniform rank; `RankCallback` moves the ranks.

    A classifier's head trains in full and is saved: in a transformers model for classification,
    question answering or multiple choice, everything outside of its body. The same holds for a linear layer
    that the checkpoint lacked, such as a pooler, if transformers' `from_pretrained` has made the model.

    A PeftModel with one LoRA adapter, fresh or trained, stays the same object: only its ranks become changeable.

    Args:
        mean_rank: rank of a uniform LoRA with as many parameters, 8 by default; also the
            budget. May be a fraction: then ranks start at the integers next to it.
        max_rank: slots of each layer; by default twice the mean, rounded up.
        depth: adapt only the top `depth` transformer blocks, with as many parameters as `mean_rank` has in all
            blocks: ranks are higher there, and the backward pass ends below. None for all blocks.
        alpha: the scale is alpha / mean_rank, for every layer and the whole run. 16 by default.
        target_modules: names or endings of names of linear layers and embeddings, or
            "all-linear": every linear layer but heads and the output embedding.
        modules_to_save: further modules that train in full, without LoRA.
        config: a LoraConfig instead of all the others but max_rank and depth; its r is the mean rank,
            and only its modules_to_save train in full.

    Raises SettingsError if no module matches, and for a depth above the number of blocks; UnsupportedError for options
    of LoraConfig that are not plain LoRA, and for adapters that are not one plain LoRA of one scale.
    """
    options = (mean_rank, alpha, dropout, target_modules, tuple(modules_to_save))
    changed = options != (None, None, 0.0, "all-linear", ())
    if isinstance(model, PeftModel):
        if changed or depth is not None or config is not None:
            raise SettingsError("the model has an adapter, which decides all but max_rank; leave out the other options")
        return _adopt(model, only_adapter(model), max_rank)
    if config is None:
        mean = MEAN_RANK if mean_rank is None else mean_rank
        config = new_config(model, target_modules, dropout, modules_to_save)
        scale = _scale(ALPHA if alpha is None else alpha, mean)
    elif changed:
        raise SettingsError(
            "wrap takes config=LoraConfig(...) instead of mean_rank, alpha, dropout, target_modules and "
            "modules_to_save; give either"
        )
    else:
        _require_plain(config, (*_NOT_PLAIN, "rank_pattern", "alpha_pattern"), inits=(True,))
        config, mean = copy.deepcopy(config), config.r
        scale = config.lora_alpha / (mean**0.5 if config.use_rslora else mean)
    mean = _restrict(model, config, mean, depth)
    peft_model, ranks = _inject_at(model, config, mean, default_max_rank(mean) if max_rank is None else max_rank, scale)
    return install(peft_model, ranks, capacity=config.r)


def plain_lora(
    model: nn.Module,
    *,
    mean_rank: float,
    depth: int | None = None,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str],
) -> PeftModel:
    """PEFT's own LoRA at uniform rank, without slots; options as in `wrap`.

    `rank_pattern` spends the budget where the mean is no integer, or above a narrow layer's size.
    """
    config, scale = new_config(model, target_modules, dropout, modules_to_save), _scale(alpha, mean_rank)
    mean = _restrict(model, config, mean_rank, depth)
    peft_model, ranks = _inject_at(model, config, mean, math.ceil(mean), scale)
    if set(ranks.values()) == {config.r}:
        return peft_model
    return finalize(install(peft_model, ranks, capacity=config.r))


def _scale(alpha: float, mean: float) -> float:
    if not 0 < mean < math.inf:
        raise SettingsError(f"ranks.mean is {mean:g}; give a number above 0")
    return alpha / mean


def _restrict(model: nn.Module, config: LoraConfig, mean: float, depth: int | None) -> float:
    """Narrow the config to the top blocks; the mean rank there that has the parameters of `mean` in all blocks."""
    if depth is None:
        return mean
    with torch.random.fork_rng():  # the same first weights as without a depth
        trial = inject(model, copy.deepcopy(config))
        cost = costs(layer_shapes(trial))
        trial.unload()
        vars(model).pop("peft_config", None)  # PEFT 0.18 leaves it
    top = top_layers(model, list(cost), depth)
    config.target_modules, config.exclude_modules, config.layers_to_transform = top, None, None
    return mean * sum(cost.values()) / sum(cost[name] for name in top)


def _inject_at(
    model: nn.Module, config: LoraConfig, mean: float, capacity: int, scale: float
) -> tuple[PeftModel, dict[str, int]]:
    """A new adapter at its capacity, and the uniform ranks that spend the budget."""
    if mean > capacity:
        raise SettingsError(
            f"the mean rank is {mean:g}, and ranks.max is {capacity}; raise ranks.max, or lower ranks.mean"
        )
    config.r, config.lora_alpha = capacity, alpha_for(scale, capacity)  # pyright: ignore[reportAttributeAccessIssue]
    peft_model = inject(model, config)
    layers = layers_of(peft_model)
    for layer in layers.values():
        layer.scaling["default"] = scale
    uniform = Sensitivity(dict.fromkeys(layers, 1.0), layer_shapes(peft_model), "uniform", 0)
    return peft_model, allocate(uniform, mean_rank=mean, min_rank=0, max_rank=capacity)


def _adopt(model: PeftModel, adapter: str, max_rank: int | None) -> PeftModel:
    """Add slots to an adapter: its weights first, zeros up to the capacity."""
    # A copy: PEFT keeps the user's config object, which may serve other models.
    model.peft_config[adapter] = copy.deepcopy(model.peft_config[adapter])
    ranks, shapes = {name: layer.r[adapter] for name, layer in lora_layers(model).items()}, layer_shapes(model)
    largest = max(ranks, key=lambda name: ranks[name])
    mean = used(ranks, shapes) / sum(costs(shapes).values())
    capacity = default_max_rank(mean, least=ranks[largest]) if max_rank is None else max_rank
    if capacity < ranks[largest]:
        raise SettingsError(f"max_rank is {capacity}, and {largest} has rank {ranks[largest]}; raise max_rank")
    return install(model, ranks, capacity=capacity)


def top_layers(model: nn.Module, layers: Sequence[str], depth: int) -> list[str]:
    """Those of the layers that lie in the top `depth` transformer blocks or above them, by the order of registration.

    Raises SettingsError where the model has fewer blocks, or none of the layers lies that high.

    >>> model = nn.Sequential(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)), nn.Linear(2, 2))
    >>> top_layers(model, ["0.0.0", "0.1.0", "0.2.0", "1"], 2)
    ['0.1.0', '0.2.0', '1']
    """
    blocks = transformer_blocks(model, layers)
    if not 1 <= depth <= len(blocks):
        choices = f"1 to {len(blocks)}, or to all" if blocks else "all"
        raise SettingsError(
            f"ranks.depth is {depth}, and the model has {len(blocks)} transformer blocks (entries of an nn.ModuleList "
            f"with layers to adapt); set it to {choices} (None in tsqlora.wrap)"
        )
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    top = [layer for layer in layers if order[layer] >= order[blocks[-depth]]]
    if not top:
        raise SettingsError(
            f"ranks.depth is {depth}, and no layer of adapter.target_modules lies in the top {depth} of "
            f"{len(blocks)} blocks; raise it, or adapt other layers"
        )
    return top


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
    model: nn.Module, target_modules: str | Sequence[str], dropout: float, modules_to_save: Sequence[str]
) -> LoraConfig:
    """A config for these targets, under which the model's head trains whole and is saved.

    So do other linear layers that the checkpoint lacked, such as a pooler: they have random weights.
    """
    own = heads(model)
    whole = [*modules_to_save, *own]
    # transformers marks every parameter that it has loaded; a model without marks has none.
    if any(map(was_loaded, model.parameters())) and not getattr(model, "is_quantized", False):
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        for name, module in model.named_modules():
            new = is_linear(module) and module is not output and not was_loaded(module.weight)
            whole += [name] if new and name.partition(".")[0] not in own else []
    # PEFT copies a module in place: of one inside another it would train a copy that no forward pass calls.
    whole = outermost(whole)
    return LoraConfig(
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=dropout,
        modules_to_save=whole or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # PEFT trains and saves the head by it too.
        task_type=TaskType.SEQ_CLS if type(model).__name__.endswith("ForSequenceClassification") else None,
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


def only_adapter(model: PeftModel) -> str:
    """The name of the model's adapter; UnsupportedError unless it is plain LoRA of one scale, alone, and trains."""
    if has_slots(model):
        raise UnsupportedError("the model has rank slots already; wrap it once")
    if len(model.peft_config) != 1:
        remedy = (
            "give the trainer (such as DPO's), which adds 'ref' itself, the plain model and peft_config=LoraConfig(...)"
            if "ref" in model.peft_config
            else "remove the others: model.delete_adapter(name)"
        )
        raise UnsupportedError(f"ranks change in one adapter, but there are {', '.join(model.peft_config)}; {remedy}")
    ((adapter, config),) = model.peft_config.items()
    if config.peft_type != PeftType.LORA:
        raise UnsupportedError(
            f"the adapter is {PeftType(config.peft_type).value}, and ranks change only in LoRA; use LoraConfig"
        )
    # Initialisations that leave the base weights as they are.
    _require_plain(cast(LoraConfig, config), _NOT_PLAIN, inits=(True, False, "gaussian", "orthogonal", "eva"))
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise UnsupportedError("the adapter is merged into the model; take it out first: model.unmerge_adapter()")
    layers = lora_layers(model)
    if not any(p.requires_grad for layer in layers.values() for p in lora_matrices(layer, adapter)):
        raise UnsupportedError("the adapter is frozen; load it with PeftModel.from_pretrained(..., is_trainable=True)")
    scales = {name: layer.scaling[adapter] for name, layer in layers.items()}
    (low, least), (high, most) = (pick(scales.items(), key=lambda item: item[1]) for pick in (min, max))
    if not math.isclose(least, most, rel_tol=1e-9):
        raise UnsupportedError(
            f"the adapter's scale lora_alpha / r is {least:g} in {low} and {most:g} in {high}; changing ranks need one "
            "scale: set alpha_pattern by rank_pattern"
        )
    return adapter


def _require_plain(config: LoraConfig, refused: Sequence[str], *, inits: Sequence[Any]) -> None:
    for name in refused:
        if getattr(config, name):
            raise UnsupportedError(f"LoraConfig({name}=…) is not supported with changing ranks; leave it out")
    if config.init_lora_weights not in inits:
        raise UnsupportedError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) depends on the rank or on the base weights; "
            "leave it out"
        )


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
            raise DataError(f"the adapter has {name}, which the model lacks; give the adapter's base")
        if parameter.shape != tensor.shape:
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)} in the adapter and {tuple(parameter.shape)} in the model: its "
                "head was trained on other classes; give rows of the same classes, or merge it and train the model"
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
