"""Rank slots: LoRA matrices built at their capacity, of which a prefix is active.

A slot is a row of A with its column of B. A parametrisation of the two weights shows the
model only the active slots, so compute follows the rank while no parameter ever changes
shape: optimizer, schedule, gradient scaler and DDP buckets do not notice. Inactive slots
are exactly zero, in weights and optimizer state. State dicts hold the active part only,
under PEFT's own names, and loading one sets the ranks from its shapes.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, type_before_parametrizations

from tsqlora import distributed
from tsqlora.adapter.patterns import alpha_for, lora_config
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.libs.bitsandbytes import keep_as_trained
from tsqlora.libs.peft import VARIANTS, lora_matrices, places_of
from tsqlora.libs.torch import remove_state_dict_hooks, show_directly
from tsqlora.paper.budget import default_max_rank
from tsqlora.paper.sites import lora_layers
from tsqlora.training.lora import ALPHA, MEAN_RANK, costs, cut, layer_shapes, used, with_room
from tsqlora.training.lora import active_ranks as active_ranks


class ActivePrefix(nn.Module):
    """Shows the first `rank` slots of a matrix along `dim`."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.dim = dim
        self.rank = rank

    def forward(self, full: Tensor) -> Tensor:
        return full.narrow(self.dim, 0, self.rank)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A or B of a LoRA layer: a linear layer's weight, or of an Embedding's adapter an entry of a ParameterDict."""

    holder: nn.Module
    tensor: str
    path: str
    """The holder's name in a PeftModel."""
    dim: int
    """The dimension of the slots."""

    @property
    def key(self) -> str:
        """Its name in PEFT's state dict."""
        return f"{self.path}.{self.tensor}"

    @property
    def full_key(self) -> str:
        """Its name in the state dict of a module with slots."""
        return f"{self.path}.parametrizations.{self.tensor}.original"

    @property
    def has_slots(self) -> bool:
        return is_parametrized(self.holder, self.tensor)

    @property
    def full(self) -> nn.Parameter:
        """All slots, active or not."""
        return cast(Any, self.holder).parametrizations[self.tensor].original

    @property
    def prefix(self) -> ActivePrefix:
        """The parametrisation that shows the active slots."""
        return cast(Any, self.holder).parametrizations[self.tensor][0]

    def make_slots(self, rank: int, capacity: int) -> None:
        """Keep the first `rank` slots, zeros up to the capacity; the parameter stays the same object."""
        weight = cast(nn.Parameter, getattr(self.holder, self.tensor))
        shape = [capacity if dim == self.dim else size for dim, size in enumerate(weight.shape)]
        full = weight.detach().new_zeros(shape)
        full.narrow(self.dim, 0, rank).copy_(weight.detach().narrow(self.dim, 0, rank))
        weight.data, weight.grad = full, None
        register_parametrization(self.holder, self.tensor, ActivePrefix(self.dim, rank), unsafe=True)
        show_directly(type(self.holder), self.tensor)
        if isinstance(self.holder, nn.Linear):
            setattr(self.holder, ("out_features", "in_features")[self.dim], capacity)

    def remove_slots(self) -> None:
        """Show all slots, as a plain parameter."""
        full = self.full
        # Not by torch's remove_parametrizations: it takes the property off a class that copies of the module share.
        self.holder.__class__ = type_before_parametrizations(self.holder)
        del self.holder.parametrizations
        setattr(self.holder, self.tensor, full)


def matrices(name: str, layer: LoraLayer, adapter: str) -> tuple[Matrix, Matrix]:
    """A and B of a layer's adapter."""
    (a, name_a, path_a), (b, name_b, path_b) = places_of(layer, adapter)
    path = f"base_model.model.{name}"
    return Matrix(a, name_a, f"{path}.{path_a}", 0), Matrix(b, name_b, f"{path}.{path_b}", 1)


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of one LoRA layer."""

    name: str
    layer: LoraLayer
    adapter: str
    parts: tuple[Matrix, Matrix]

    @property
    def a(self) -> nn.Parameter:
        """capacity × i; the active rows first, the others zero."""
        return self.parts[0].full

    @property
    def b(self) -> nn.Parameter:
        """o × capacity; the active columns first, the others zero."""
        return self.parts[1].full

    @property
    def capacity(self) -> int:
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        return self.parts[0].prefix.rank

    @property
    def scale(self) -> float:
        """s, by which BA is multiplied; the same whatever the rank."""
        return self.layer.scaling[self.adapter]

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of the layer."""
        return self.a.shape[1], self.b.shape[0]

    def matrices(self) -> tuple[tuple[nn.Parameter, int], tuple[nn.Parameter, int]]:
        """Both parameters, each with the dimension along which its slots lie."""
        return (self.a, 0), (self.b, 1)

    def set_rank(self, rank: int) -> None:
        """Change how many slots are shown; the caller keeps hidden slots at zero."""
        assert 0 <= rank <= self.capacity
        for part in self.parts:
            part.prefix.rank = rank
        self.layer.r[self.adapter] = rank


def wrap(
    model: nn.Module,
    *,
    mean_rank: float | None = None,
    max_rank: int | None = None,
    depth: int | None = None,
    alpha: float = ALPHA,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Build a PeftModel with LoRA in every target, at uniform rank, whose ranks `RankCallback` moves.

    A PeftModel with one LoRA adapter, fresh or trained, stays the same object: only its ranks become changeable.

    Args:
        mean_rank: rank of a uniform LoRA with as many parameters, 8 by default; also the
            budget. May be a fraction: then ranks start at the integers next to it.
        max_rank: slots of each layer; by default twice the mean, rounded up.
        depth, alpha and the others: as in `tsqlora.wrap`.

    Raises SettingsError if no module matches, and for a depth above the number of blocks; UnsupportedError for an
    adapter that is not one plain LoRA of one scale.
    """
    options = (depth, alpha, dropout, target_modules, modules_to_save)
    if isinstance(model, PeftModel):
        if mean_rank is not None or options != (None, ALPHA, 0.0, "all-linear", ()):
            raise SettingsError("the model has an adapter, which decides all but max_rank; leave out the other options")
        return _adopt(model, _only_adapter(model), max_rank)

    def capacity(mean: float) -> int:
        most = default_max_rank(mean) if max_rank is None else max_rank
        if mean > most:
            raise SettingsError(
                f"the mean rank is {mean:g}, and ranks.max is {most}; raise ranks.max, or lower ranks.mean"
            )
        return most

    peft_model, ranks = with_room(model, MEAN_RANK if mean_rank is None else mean_rank, capacity, *options)
    return install(peft_model, ranks, capacity=cast(LoraConfig, peft_model.peft_config["default"]).r)


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


def _only_adapter(model: PeftModel) -> str:
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
    for name in _NOT_PLAIN:
        if getattr(config, name):
            raise UnsupportedError(f"LoraConfig({name}=…) is not supported with changing ranks; leave it out")
    init = cast(LoraConfig, config).init_lora_weights
    if init not in (True, False, "gaussian", "orthogonal", "eva"):  # which leave the base weights as they are
        raise UnsupportedError(
            f"LoraConfig(init_lora_weights={init!r}) depends on the rank or on the base weights; leave it out"
        )
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


def install(model: PeftModel, ranks: Mapping[str, int], *, capacity: int) -> PeftModel:
    """Turn the LoRA matrices of a model's only adapter into slots, of which these many are active.

    `ranks` names the layers as PEFT's rank_pattern does. The first rows of A and columns of B
    are kept, and the scales.
    """
    keep_as_trained(model)
    ((adapter, config),) = model.peft_config.items()
    for name, layer in lora_layers(model).items():
        for part in matrices(name, layer, adapter):
            part.make_slots(ranks[name], capacity)
        layer.use_rslora[adapter] = False
    # The config gets the scale as α/r; the first values are set already.
    config.use_rslora, config.init_lora_weights = False, True  # pyright: ignore[reportAttributeAccessIssue]
    model.register_state_dict_post_hook(_save_active)
    model.register_load_state_dict_pre_hook(_load_active)
    cast(Any, model).get_nb_trainable_parameters = partial(_active_counts, model)
    sync_config(model)
    return model


def has_slots(model: nn.Module) -> bool:
    """Whether the model was made by `wrap` and is not finalised."""
    return any(isinstance(module, ActivePrefix) for module in model.modules())


def find_slots(model: nn.Module) -> dict[str, Slots]:
    """The slots of every LoRA layer by the layer's name in the base model.

    Raises UnsupportedError if the model has none: it was not made by `wrap`, or is finalised.
    """
    if not has_slots(model):
        raise UnsupportedError(
            "the model has no rank slots, so its ranks cannot change; make it with tsqlora.paper.wrap(model), "
            "and train it before finalize"
        )
    return {
        name: Slots(name, layer, adapter, parts)
        for name, layer in lora_layers(model).items()
        for adapter in layer.r
        if (parts := matrices(name, layer, adapter))[0].has_slots
    }


def active_parameters(model: nn.Module) -> int:
    """Trainable parameters that are active: hidden slots do not count."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - _hidden_parameters(model)


def _hidden_parameters(model: nn.Module) -> int:
    return sum(
        parameter.numel() // slots.capacity * (slots.capacity - slots.rank)
        for slots in (find_slots(model).values() if has_slots(model) else ())
        for parameter, _ in slots.matrices()
        if parameter.requires_grad
    )


def _active_counts(model: PeftModel) -> tuple[int, int]:
    """PEFT's counts for `print_trainable_parameters`, trainable and all, without hidden slots."""
    trainable, total = type(model).get_nb_trainable_parameters(model)
    hidden = _hidden_parameters(model)
    return trainable - hidden, total - hidden


def finalize(model: PeftModel) -> PeftModel:
    """Turn slots into plain LoRA weights of the active ranks; returns the model.

    The result is a PEFT model like any other: it merges, copies and pickles. A layer at
    rank 0 becomes its base layer again. Parameters stay the same objects, and are smaller: an
    optimizer made before must be made again. Does nothing to a model without slots.
    """
    if not has_slots(model):
        return model
    if any(map(distributed.is_sharded, model.parameters())):
        raise UnsupportedError(
            "the model's weights are sharded over processes (FSDP), so its slots cannot be removed; call "
            "RankLoop.finish(finalize_model=False), and save the full state dict, which is plain PEFT"
        )
    layers = find_slots(model)
    ranks = {name: slots.rank for name, slots in layers.items()}
    for slots in layers.values():
        for part in slots.parts:
            part.remove_slots()
    cut(model, next(iter(layers.values())).adapter, ranks)
    remove_state_dict_hooks(model, _save_active, _load_active)
    del model.get_nb_trainable_parameters
    return model


def sync_config(model: PeftModel) -> None:
    """Write the active ranks into the PEFT config: r, lora_alpha, target_modules, patterns.

    The scale s is the same in every layer, α_l = s·r_l, and so is lora_alpha / r = s.
    """
    layers = find_slots(model).values()
    first = next(iter(layers))
    ranks = {slots.name: slots.rank for slots in layers}
    for key, value in lora_config(ranks, first.scale).items():
        setattr(model.peft_config[first.adapter], key, value)
    for slots in layers:
        slots.layer.r[slots.adapter] = slots.rank
        slots.layer.lora_alpha[slots.adapter] = alpha_for(slots.scale, slots.rank)


def _save_active(model: PeftModel, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """After state_dict: the active part of each matrix under PEFT's own name, none for a layer at rank 0."""
    # PEFT saves the config after the weights.
    sync_config(model)
    for slots in find_slots(model).values():
        for part in slots.parts:
            full = state.pop(f"{prefix}{part.full_key}")
            if slots.rank > 0:
                # A copy: safetensors refuses views into a larger storage.
                active = full.narrow(part.dim, 0, slots.rank).clone(memory_format=torch.contiguous_format)
                state[f"{prefix}{part.key}"] = active


def _load_active(model: PeftModel, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Before load_state_dict: ranks from the shapes, weights padded with zeros to the capacity.

    A layer that the state dict lacks is at rank 0, unless it lacks all: then it has no adapter.
    """
    layers = find_slots(model)
    saved = {name: [state.pop(f"{prefix}{part.key}", None) for part in slots.parts] for name, slots in layers.items()}
    if all(a is None and b is None for a, b in saved.values()):
        return
    ranks = dict.fromkeys(layers, 0)
    for name, (a, b) in saved.items():
        slots, (inputs, outputs) = layers[name], layers[name].shape
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
            shapes = [None if part is None else tuple(part.shape) for part in (a, b)]
            raise SettingsError(
                f"{name}: the saved lora_A and lora_B have shapes {shapes[0]} and {shapes[1]}, and the layer has "
                f"{inputs} inputs and {outputs} outputs; load the adapter into the model that it was trained for"
            )
        if a.shape[0] > slots.capacity:
            raise SettingsError(
                f"{name}: the saved rank is {a.shape[0]}, and the model's slots end at {slots.capacity}; wrap the "
                "model with a larger max_rank"
            )
        ranks[name] = a.shape[0]
    for name, slots in layers.items():
        slots.set_rank(ranks[name])
        for part, active in zip(slots.parts, saved[name], strict=True):
            padded = torch.zeros_like(part.full, requires_grad=False)
            if active is not None:
                padded.narrow(part.dim, 0, slots.rank).copy_(active)
            state[f"{prefix}{part.full_key}"] = padded
    sync_config(model)
