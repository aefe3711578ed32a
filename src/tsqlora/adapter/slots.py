"""Rank slots: LoRA matrices built at their capacity, of which a prefix is active.

A slot is a row of A with its column of B. A parametrisation of the two weights shows the
model only the active slots, so compute follows the rank while no parameter ever changes
shape: optimizer, schedule, gradient scaler and DDP buckets do not notice. Inactive slots
are exactly zero, in weights and optimizer state. State dicts hold the active part only,
under PEFT's own names, and loading one sets the rank from its shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import lora_layers

_FULL = "parametrizations.weight.original"


class ActivePrefix(nn.Module):
    """Shows the first `rank` slots of a matrix along `dim`."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.dim = dim
        self.rank = rank

    def forward(self, full: Tensor) -> Tensor:
        return full.narrow(self.dim, 0, self.rank)


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of one LoRA layer."""

    name: str
    layer: LoraLayer
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """capacity × i; the active rows first, the others zero."""
        return _full(self.layer.lora_A[self.adapter])

    @property
    def b(self) -> nn.Parameter:
        """o × capacity; the active columns first, the others zero."""
        return _full(self.layer.lora_B[self.adapter])

    @property
    def capacity(self) -> int:
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        return _prefix(self.layer.lora_A[self.adapter]).rank

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
        """Changes how many slots are shown; the caller keeps hidden slots at zero."""
        assert 0 <= rank <= self.capacity
        for module in (self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]):
            _prefix(module).rank = rank
        self.layer.r[self.adapter] = rank


def install(model: PeftModel, ranks: Mapping[str, int], *, scale: float) -> None:
    """Turns a freshly built PEFT model's LoRA matrices into slots with these active ranks.

    `ranks` names the layers as PEFT's rank_pattern does. Slots above the rank are zeroed.
    """
    adapter = model.active_adapter
    for name, layer in lora_layers(model).items():
        rank = ranks[name]
        for module, dim in ((layer.lora_A[adapter], 0), (layer.lora_B[adapter], 1)):
            with torch.no_grad():
                module.weight.narrow(dim, rank, module.weight.shape[dim] - rank).zero_()
            register_parametrization(module, "weight", ActivePrefix(dim, rank), unsafe=True)
            module.register_state_dict_post_hook(_save_active)
            module.register_load_state_dict_pre_hook(_load_active)
        layer.scaling[adapter] = scale
    model.register_load_state_dict_post_hook(_after_load)
    sync_config(model)


def find_slots(model: nn.Module) -> dict[str, Slots]:
    """The slots of every LoRA layer by the layer's name in the base model.

    Raises UnsupportedError if the model has none: it was not made by `wrap`, or is finalised.
    """
    found: dict[str, Slots] = {}
    for name, layer in lora_layers(model).items():
        for adapter, module in layer.lora_A.items():
            if is_parametrized(module, "weight"):
                found[name] = Slots(name, layer, adapter)
    if not found:
        raise UnsupportedError(
            "the model has no rank slots, so its ranks cannot change; make it with tsqlora.wrap(model) "
            "(and wrap again after finalize)"
        )
    return found


def active_ranks(model: nn.Module) -> dict[str, int]:
    """Each layer's rank as it is now, by the layer's name in the base model."""
    return {name: slots.rank for name, slots in find_slots(model).items()}


def active_parameters(model: nn.Module) -> int:
    """Trainable parameters that are active: hidden slots do not count."""
    hidden = 0
    if any(is_parametrized(m, "weight") for m in model.modules()):
        hidden = sum((s.capacity - s.rank) * sum(s.shape) for s in find_slots(model).values())
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - hidden


def drop_slots(slots: Slots, which: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
    """Removes active slots; those kept move together, with their optimizer state, bit for bit."""
    gone = set(which)
    kept = [j for j in range(slots.rank) if j not in gone]
    assert len(kept) == slots.rank - len(which)
    order = torch.tensor(kept + sorted(gone) + list(range(slots.rank, slots.capacity)))
    for parameter, dim in slots.matrices():
        for tensor in _with_state(parameter, optimizer):
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
            tensor.narrow(dim, len(kept), len(gone)).zero_()
    slots.set_rank(len(kept))


def grow_slot(
    slots: Slots,
    direction: Float[Tensor, " i"],
    optimizer: torch.optim.Optimizer | None,
    *,
    fallback: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Adds one slot that leaves ΔW bit-equal: `direction` as A's row, zeros as B's column.

    First moments start at zero. Second moments start at the mean of the matrix's kept slots
    (`fallback`, of A and of B, where none is active): Adam counts steps by tensor, so zeros
    would make the first updates several times the learning rate.
    """
    rank = slots.rank
    assert rank < slots.capacity
    with torch.no_grad():
        slots.a[rank] = direction.to(slots.a)
        slots.b[:, rank] = 0
        for (parameter, dim), empty in zip(slots.matrices(), fallback, strict=True):
            for name, state in _elementwise_state(parameter, optimizer).items():
                new = state.select(dim, rank)
                if name in SECOND_MOMENTS:
                    new.copy_(state.narrow(dim, 0, rank).mean(dim) if rank else torch.full_like(new, empty))
                else:
                    new.zero_()
    slots.set_rank(rank + 1)


FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def second_moment_means(layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """Mean second moment over all active slots of all A, and of all B: what a layer at rank 0 starts from."""
    means: list[float] = []
    for side in (0, 1):
        active = [
            state.narrow(side, 0, slots.rank).flatten()
            for slots in layers.values()
            for name, state in _elementwise_state(slots.matrices()[side][0], optimizer).items()
            if name == "exp_avg_sq"
        ]
        joined = torch.cat(active) if active else torch.zeros(0)
        means.append(float(joined.mean()) if joined.numel() else 0.0)
    return means[0], means[1]


def finalize(model: PeftModel) -> PeftModel:
    """Turns slots into plain LoRA weights of exactly the active ranks; returns the model.

    What is left is a PEFT model like any other: it merges, copies and pickles. A layer at
    rank 0 becomes its base layer again. The parameters are new ones: an optimizer made
    before no longer trains them. Does nothing to a model without slots.
    """
    if not any(isinstance(m, ActivePrefix) for m in model.modules()):
        return model
    layers = find_slots(model)
    sync_config(model)
    for slots in layers.values():
        if slots.rank == 0:
            _restore_base(model, slots)
            continue
        for module, features in (
            (slots.layer.lora_A[slots.adapter], "out_features"),
            (slots.layer.lora_B[slots.adapter], "in_features"),
        ):
            weight = module.weight.detach().clone(memory_format=torch.contiguous_format)
            trains = _full(module).requires_grad
            remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight = nn.Parameter(weight, requires_grad=trains)
            setattr(module, features, slots.layer.r[slots.adapter])
    return model


def sync_config(model: nn.Module) -> None:
    """Writes the active ranks into the PEFT config: r, lora_alpha, target_modules, patterns.

    The scale s is the same in every layer, α_l = s·r_l, and so is lora_alpha / r = s.
    """
    layers = find_slots(model)
    first = next(iter(layers.values()))
    config = model.peft_config[first.adapter]  # type: ignore[union-attr,index]
    ranks = {name: slots.rank for name, slots in layers.items() if slots.rank > 0}
    if not ranks:
        raise SettingsError("every layer is at rank 0: nothing would be left of the adapter; set ranks.min to 1")
    for key, value in adapter_config(ranks, scale=first.scale).items():
        setattr(config, key, value)
    for slots in layers.values():
        slots.layer.r[slots.adapter] = slots.rank
        slots.layer.lora_alpha[slots.adapter] = number(slots.scale * slots.rank)


def adapter_config(ranks: Mapping[str, int], *, scale: float) -> dict[str, Any]:
    """LoraConfig's arguments for these ranks: r, lora_alpha, target_modules and the patterns.

    Layers at rank 0 are left out. The longest name comes first in the patterns, since PEFT
    takes the first that matches the end of a layer's name.
    """
    active = {name: rank for name, rank in ranks.items() if rank > 0}
    largest = max(active.values())
    longest_first = sorted(active, key=lambda name: (-len(name), name))
    mixed = len(set(active.values())) > 1
    return {
        "r": largest,
        "lora_alpha": number(scale * largest),
        "target_modules": sorted(active),
        "rank_pattern": {name: active[name] for name in longest_first} if mixed else {},
        "alpha_pattern": {name: number(scale * active[name]) for name in longest_first} if mixed else {},
    }


def number(x: float) -> float | int:
    """A whole number as int, as LoraConfig's fields have it; else the float."""
    return int(x) if float(x).is_integer() else x


def _restore_base(model: PeftModel, slots: Slots) -> None:
    parent, _, child = slots.name.rpartition(".")
    base = model.get_base_model()
    setattr(base.get_submodule(parent) if parent else base, child, slots.layer.get_base_layer())


def _full(module: nn.Module) -> nn.Parameter:
    return module.get_parameter(_FULL)


def _prefix(module: nn.Module) -> ActivePrefix:
    prefix = module.get_submodule("parametrizations.weight.0")
    assert isinstance(prefix, ActivePrefix)
    return prefix


def _elementwise_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The optimizer's tensors that have one number for each of the parameter's.

    Raises UnsupportedError for state whose meaning is not known: it could not be kept right.
    """
    if optimizer is None or parameter not in optimizer.state:
        return {}
    state = {n: v for n, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.dim() > 0}
    for name, value in state.items():
        if name not in (*FIRST_MOMENTS, *SECOND_MOMENTS) or value.shape != parameter.shape:
            raise UnsupportedError(
                f"the optimizer keeps '{name}' of shape {tuple(value.shape)} for a weight of shape "
                f"{tuple(parameter.shape)}: it is not known how a rank change moves it; use AdamW, Adam or SGD"
            )
    return state


def _with_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """The parameter's numbers, its gradient's if there is one, and the optimizer's."""
    grads = [] if parameter.grad is None else [parameter.grad]
    return [parameter.detach(), *grads, *_elementwise_state(parameter, optimizer).values()]


def _save_active(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if not is_parametrized(module, "weight"):
        return
    part = _prefix(module)
    full = state.pop(prefix + _FULL)
    if part.rank > 0:
        # A copy: safetensors refuses views into a larger storage.
        state[prefix + "weight"] = full.narrow(part.dim, 0, part.rank).clone(memory_format=torch.contiguous_format)


def _load_active(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    if not is_parametrized(module, "weight") or prefix + _FULL in state:
        return
    part, current = _prefix(module), _full(module).detach()
    active = state.pop(prefix + "weight", None)
    if active is None and not any(".lora_A." in key for key in state):
        return  # a state dict of something else: no word about this adapter's ranks
    padded = torch.zeros_like(current)
    rank = 0
    if active is not None:
        rank = active.shape[part.dim]
        if rank > current.shape[part.dim]:
            raise SettingsError(
                f"{prefix}weight has rank {rank}, the model's slots end at {current.shape[part.dim]}; "
                "wrap the model with a larger max_rank"
            )
        padded.narrow(part.dim, 0, rank).copy_(active)
    part.rank = rank
    state[prefix + _FULL] = padded


def _after_load(model: nn.Module, _keys: Any) -> None:
    if any(isinstance(m, ActivePrefix) for m in model.modules()):
        sync_config(model)
