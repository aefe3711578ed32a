"""A PEFT LoRA model: with slots, so that its ranks can change (`wrap`), or plain (`plain_lora`)."""

import copy
import math
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from tsqlora.adapter.config import inject, new_config, only_adapter, require_fresh
from tsqlora.adapter.slots import finalize, install, layer_shapes, layers_of
from tsqlora.compat.transformers import transformer_blocks
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import lora_layers
from tsqlora.interop.patterns import alpha_for
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import costs, default_max_rank, used

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

    A classifier's head trains whole and is saved: in a transformers model for classification,
    question answering or multiple choice, all that lies beside its body. So is a linear layer
    that the checkpoint lacked, such as a pooler, where transformers' `from_pretrained` has made the model.

    A PeftModel with one LoRA adapter, fresh or trained, stays the same object: only its ranks become changeable.

    Args:
        mean_rank: rank of a uniform LoRA with as many parameters, 8 by default; also the
            budget. May be a fraction: then ranks start at the integers next to it.
        max_rank: slots a layer is built with, twice the mean by default (rounded up).
        depth: adapt the top `depth` transformer blocks alone, with as many parameters as `mean_rank` has in all
            blocks: ranks are higher there, and the backward pass ends below. None for all blocks.
        alpha: the scale is alpha / mean_rank, for every layer and the whole run. 16 by default.
        target_modules: names or endings of names of linear layers and embeddings, or
            "all-linear": every linear layer but heads and the output embedding.
        modules_to_save: further modules that train whole, without LoRA.
        config: a LoraConfig instead of all the others but max_rank and depth; its r is the mean rank,
            and its modules_to_save are all that trains whole.

    Raises SettingsError if no module matches, and for a depth above the number of blocks; UnsupportedError for options
    of LoraConfig that are not plain LoRA, and for adapters that are not one plain LoRA of one scale.
    """
    options = (mean_rank, alpha, dropout, target_modules, tuple(modules_to_save))
    changed = options != (None, None, 0.0, "all-linear", ())
    if isinstance(model, PeftModel):
        if changed or depth is not None or config is not None:
            raise SettingsError("the model has an adapter, which decides all but max_rank; leave out the other options")
        return _adopt(model, max_rank)
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
        require_fresh(config)
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


def _adopt(model: PeftModel, max_rank: int | None) -> PeftModel:
    """Add slots to an adapter: its weights first, zeros up to the capacity."""
    adapter = only_adapter(model)
    # A copy: PEFT keeps the user's config object, which may serve other models.
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
    shapes = layer_shapes(model)
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
