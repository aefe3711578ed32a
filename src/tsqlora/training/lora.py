"""Plain LoRA: a PeftModel with uniform ranks and heads that train, new or from an adapter that exists."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsqlora.adapter.base import module_shapes
from tsqlora.adapter.files import PREFIX, config_for, read_adapter, tensors_of
from tsqlora.adapter.health import require_finite
from tsqlora.adapter.lora import LoraAdapter
from tsqlora.adapter.patterns import alpha_for, lora_config
from tsqlora.adapter.rewrite import commonest_scale, folded, require_fits, require_plain
from tsqlora.adapter.tensors import to_bytes
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.libs.peft import forget_adapter, places_of
from tsqlora.libs.transformers import transformer_blocks, was_loaded
from tsqlora.model.load import heads, outermost, require_supported_packing
from tsqlora.model.modules import inner_name, is_linear

MEAN_RANK = 8.0
ALPHA = 16.0

Shapes = Mapping[str, tuple[int, int]]
"""(i, o) of each layer: inputs, outputs."""

FLOAT_ERROR = 1e-15
"""Relative error that a float and one product with it may have: a few units in the last place."""


def wrap(
    model: nn.Module,
    *,
    mean_rank: float = MEAN_RANK,
    depth: int | None = None,
    alpha: float = ALPHA,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Build a PeftModel with plain LoRA in every target, at uniform rank.

    A classifier's head trains in full and is saved: in a transformers model for classification,
    question answering or multiple choice, everything outside of its body. The same holds for a linear layer
    that the checkpoint lacked, such as a pooler, if transformers' `from_pretrained` has made the model.

    Args:
        mean_rank: rank of a uniform LoRA with as many parameters. Where it is a fraction, or above the size of a
            narrow layer, ranks are the integers next to it, in PEFT's `rank_pattern`.
        depth: adapt only the top `depth` transformer blocks, with as many parameters as `mean_rank` has in all
            blocks: ranks are higher there, and the backward pass ends below. None for all blocks.
        alpha: the scale is alpha / mean_rank, in every layer.
        target_modules: names or endings of names of linear layers and embeddings, or
            "all-linear": every linear layer but heads and the output embedding.
        modules_to_save: further modules that train in full, without LoRA.

    Raises SettingsError if no module matches, and for a depth above the number of blocks; UnsupportedError for a model
    that has an adapter.
    """
    options = (depth, alpha, dropout, target_modules, modules_to_save)
    peft_model, ranks = with_room(model, mean_rank, math.ceil, *options)
    uniform = {*ranks.values()} == {cast(LoraConfig, peft_model.peft_config["default"]).r}
    return peft_model if uniform else cut(peft_model, "default", ranks)


def with_room(
    model: nn.Module,
    mean_rank: float,
    capacity: Callable[[float], int],
    depth: int | None,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str],
) -> tuple[PeftModel, dict[str, int]]:
    """Add LoRA of the rank that `capacity` gives for the mean in the adapted blocks; return uniform ranks too."""
    if not 0 < mean_rank < math.inf:
        raise SettingsError(f"ranks.mean is {mean_rank:g}; give a number above 0")
    config, scale = new_config(model, target_modules, dropout, modules_to_save), alpha / mean_rank
    mean = mean_rank if depth is None else _restrict(model, config, mean_rank, depth)
    config.r = capacity(mean)
    config.lora_alpha = alpha_for(scale, config.r)  # pyright: ignore[reportAttributeAccessIssue]
    peft_model = inject(model, config)
    for layer in layers_of(peft_model).values():
        layer.scaling["default"] = scale
    return peft_model, uniform_ranks(layer_shapes(peft_model), mean, config.r)


def cut(model: PeftModel, adapter: str, ranks: Mapping[str, int]) -> PeftModel:
    """Leave each of these layers the first rows of A and columns of B, by its rank.

    Scales and parameter objects stay. A layer at rank 0 becomes its base layer again.
    """
    layers = {name: layer for name, layer in layers_of(model).items() if name in ranks}
    scale = next(iter(layers.values())).scaling[adapter]
    for key, value in lora_config(ranks, scale).items():
        setattr(model.peft_config[adapter], key, value)
    for name, layer in layers.items():
        layer.r[adapter], layer.lora_alpha[adapter] = ranks[name], alpha_for(scale, ranks[name])
        if ranks[name]:
            for dim, (holder, tensor, _) in enumerate(places_of(layer, adapter)):
                weight: nn.Parameter = getattr(holder, tensor)
                active = weight.detach().narrow(dim, 0, ranks[name])
                weight.data, weight.grad = active.clone(memory_format=torch.contiguous_format), None
                if isinstance(holder, nn.Linear):
                    setattr(holder, ("out_features", "in_features")[dim], ranks[name])
        elif len(layer.r) > 1:
            forget_adapter(layer, adapter)  # the layer has others' adapters
        else:
            parent, _, child = name.rpartition(".")
            base = model.get_base_model()
            setattr(base.get_submodule(parent) if parent else base, child, layer.get_base_layer())
    return model


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have an adapter, of any kind of LoRA, by their names in the base model."""
    return {inner_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers that have an adapter."""
    return {name: (cast(int, x.in_features), cast(int, x.out_features)) for name, x in layers_of(model).items()}


def active_ranks(model: nn.Module) -> dict[str, int]:
    """Each LoRA layer's rank as it is now, by the layer's name in the base model."""
    return {name: rank for name, layer in layers_of(model).items() for rank in layer.r.values()}


def trainable_parameters(model: nn.Module) -> int:
    """The number of parameters that train, by PEFT's count where it has one."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()[0]
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def costs(shapes: Shapes) -> dict[str, int]:
    """Parameters that one rank costs in each layer, a row of A and a column of B: c = i + o.

    >>> costs({"query": (64, 32)})
    {'query': 96}
    """
    return {layer: i + o for layer, (i, o) in shapes.items()}


def used(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """Parameters that these ranks cost: Σ r c.

    >>> used({"query": 3}, {"query": (64, 32)})
    288
    """
    cost = costs(shapes)
    return sum(rank * cost[layer] for layer, rank in ranks.items())


def budget(mean_rank: float, shapes: Shapes) -> int:
    """Parameters that a uniform LoRA of rank `mean_rank` would have: ⌊r̄ Σ c⌋, docs/method.md eq. 7.

    Float error does not count: 0.29 of 100 parameters are 29, though the product is 28.999….

    Raises SettingsError if `mean_rank` is not a finite number above 0.

    >>> budget(2.5, {"query": (64, 32), "key": (64, 32)})
    480
    """
    if not (mean_rank > 0 and math.isfinite(mean_rank)):
        raise SettingsError(f"ranks.mean is {mean_rank}; give the mean rank as a number above 0")
    product = mean_rank * sum(costs(shapes).values())
    whole = round(product)
    return whole if math.isclose(product, whole, rel_tol=FLOAT_ERROR) else math.floor(product)


def uniform_ranks(shapes: Shapes, mean_rank: float, capacity: int) -> dict[str, int]:
    """Whole ranks as even as the budget of `mean_rank` allows: each goes to the layer with least, first by name.

    >>> uniform_ranks({"query": (8, 8), "key": (8, 8)}, 2.5, 4)
    {'query': 2, 'key': 3}
    """
    ranks, cost, left = dict.fromkeys(shapes, 0), costs(shapes), budget(mean_rank, shapes)
    queue = [(0, name) for name in sorted(shapes)]
    while queue:
        rank, name = heappop(queue)
        # What is left only shrinks, so a layer that does not fit now never will.
        if rank < min(capacity, *shapes[name]) and cost[name] <= left:
            ranks[name], left = rank + 1, left - cost[name]
            heappush(queue, (rank + 1, name))
    return ranks


def _restrict(model: nn.Module, config: LoraConfig, mean: float, depth: int) -> float:
    """Narrow the config to the top blocks; the mean rank there that has the parameters of `mean` in all blocks."""
    with torch.random.fork_rng():  # the same first weights as without a depth
        trial = inject(model, copy.deepcopy(config))
        cost = costs(layer_shapes(trial))
        trial.unload()
        vars(model).pop("peft_config", None)  # PEFT 0.18 leaves it
    top = top_layers(model, list(cost), depth)
    config.target_modules, config.exclude_modules, config.layers_to_transform = top, None, None
    return mean * sum(cost.values()) / sum(cost[name] for name in top)


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
            f"depth is {depth}, and the model has {len(blocks)} transformer blocks (entries of an nn.ModuleList "
            f"with layers to adapt); set it to {choices} (None in tsqlora.wrap)"
        )
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    top = [layer for layer in layers if order[layer] >= order[blocks[-depth]]]
    if not top:
        raise SettingsError(
            f"depth is {depth}, and no layer of adapter.target_modules lies in the top {depth} of "
            f"{len(blocks)} blocks; raise it, or adapt other layers"
        )
    return top


def new_config(
    model: nn.Module,
    target_modules: str | Sequence[str],
    dropout: float,
    modules_to_save: Sequence[str],
    **further: Any,
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
