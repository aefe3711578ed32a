"""Where the gradient of each parameter of θ can be seen: which module's calls show it.

A site is a weight (and bias) with the modules that use it. `scope: adapter` is all that
trains: LoRA's A and B, which PEFT keeps as two linear layers, and the task head. `scope:
full` is the target layers' frozen weights, seen at the whole LoRA layer, and the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, cast, get_args

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tsqlora.errors import SettingsError, UnsupportedError, nearest

Scope = Literal["adapter", "full"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True)
class Site:
    """One weight of θ, the modules in which it is used, and which of its parts are in θ."""

    name: str
    modules: tuple[nn.Module, ...]
    weight: bool
    bias: bool


def find_sites(model: nn.Module, scope: Scope) -> dict[str, Site]:
    """The sites of θ by name.

    Raises UnsupportedError naming the first parameter of θ whose gradient per sample cannot
    be had exactly; nothing is left out.
    """
    if scope not in get_args(Scope):
        raise SettingsError(f"unknown scope '{scope}'; {nearest(scope, get_args(Scope))}")
    trained = _trained_sites(model)
    if scope == "adapter":
        return trained
    targets = {n: Site(n, (cast(nn.Module, layer),), True, False) for n, layer in lora_layers(model).items()}
    if not targets:
        raise UnsupportedError("scope 'full' scores LoRA's target layers, and this model has none; use scope 'adapter'")
    head = {n: s for n, s in trained.items() if not any(n.startswith(f"{t}.") for t in targets)}
    return targets | head


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The model's LoRA layers over linear weights, by their names in the base model.

    Raises UnsupportedError for a LoRA layer over anything else, or for a variant whose
    update is not s·BA.
    """
    layers: dict[str, LoraLayer] = {}
    for name, module in _modules(model):
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise UnsupportedError(f"{name} is LoRA over {type(base).__name__}; only linear layers are supported")
        if module.lora_variant or any(module.lora_bias.values()):
            raise UnsupportedError(f"{name} uses a LoRA variant (DoRA or lora_bias); use plain LoRA")
        layers[inner_name(name)] = module
    return layers


def inner_name(name: str) -> str:
    """A module's name in the base model, as PEFT's patterns and targets use it."""
    return name.removeprefix("base_model.model.")


def effective_weight(layer: LoraLayer) -> Float[Tensor, "o i"]:
    """W + s·BA of a LoRA layer, dequantised where the base is quantised."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Module)
    weight = dequantize_module_weight(base).detach()
    if layer.disable_adapters or layer.merged:
        return weight
    with torch.no_grad():
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                delta: Tensor = cast(Any, layer).get_delta_weight(adapter)
                weight = weight + delta.to(weight.dtype)
    return weight


def batch_coupled(model: nn.Module) -> list[str]:
    """What makes one sample's loss depend on the others of its batch, by name."""
    found = [f"{name} ({type(m).__name__})" for name, m in _modules(model) if isinstance(m, _BATCH_NORMS)]
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        found.append("the auxiliary loss of a mixture of experts (config.output_router_logits)")
    return found


def _trained_sites(model: nn.Module) -> dict[str, Site]:
    sites: dict[int, Site] = {}
    biases: dict[int, str] = {}
    seen: set[tuple[int, int]] = set()
    for name, module in _modules(model):
        if not _is_linear(module):
            continue
        weight, bias = _trained(module, "weight"), _trained(module, "bias")
        if weight is None and bias is None:
            continue
        seen |= {(id(part[0]), id(part[1])) for part in (weight, bias) if part is not None}
        site = Site(inner_name(name), (module,), weight is not None, bias is not None)
        key = id(module) if weight is None else id(weight[1])
        sites[key] = site if key not in sites else _tied(sites[key], site)
        if bias is not None and biases.setdefault(id(bias[1]), site.name) != site.name:
            raise UnsupportedError(f"{site.name} shares its trained bias with {biases[id(bias[1])]}; freeze it")
    _refuse_unseen(model, seen)
    if not sites:
        raise UnsupportedError("the model has no trainable parameter, so there is no gradient to score by")
    return {site.name: site for site in sites.values()}


def _tied(first: Site, second: Site) -> Site:
    """One site for a weight used by two modules: its gradients are summed."""
    if first.bias or second.bias:
        raise UnsupportedError(f"{second.name} shares its weight with {first.name}, and one of them trains a bias")
    return replace(first, modules=first.modules + second.modules)


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    # A subclass that computes something else must not be taken for y = x Wᵀ + b.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _trained(module: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter] | None:
    """A layer's weight or bias and the module that holds it, if it trains.

    A parametrised one is held elsewhere; its gradient is that of the weight only if the
    parametrisation selects entries, as rank slots do. Scoring measures whether that is so.
    """
    held_as = name
    if is_parametrized(module, name):
        module, held_as = module.get_submodule(f"parametrizations.{name}"), "original"
    parameter = dict(module.named_parameters(recurse=False)).get(held_as)
    return (module, parameter) if parameter is not None and parameter.requires_grad else None


def _refuse_unseen(model: nn.Module, seen: set[tuple[int, int]]) -> None:
    for owner_name, owner in _modules(model):
        for name, parameter in owner.named_parameters(owner_name, recurse=False):
            if parameter.requires_grad and (id(owner), id(parameter)) not in seen:
                raise UnsupportedError(
                    f"{name} trains, and it belongs to {type(owner).__name__}, whose gradient per sample is not "
                    "known exactly; freeze it, or train linear layers and LoRA only"
                )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first name; torch leaves this without a type."""
    yield from cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
