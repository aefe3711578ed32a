"""Where the gradient of each parameter of θ can be seen: which module's calls show it.

A site is a weight (and bias) with the modules that use it. `scope: adapter` is all that
trains: LoRA's A and B, which PEFT keeps as two linear layers, and the task head. `scope:
full` is the target layers' frozen weights, seen at the whole LoRA layer, and the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tsqlora.errors import SettingsError, UnsupportedError, nearest

Scope = Literal["adapter", "full"]


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
    targets = {name: Site(name, (layer,), True, False) for name, layer in lora_layers(model).items()}
    if not targets:
        raise UnsupportedError(
            "scope 'full' scores LoRA's target layers, and this model has none; use scope 'adapter'"
        )
    head = {n: s for n, s in trained.items() if not any(n.startswith(f"{t}.") for t in targets)}
    return targets | head


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The model's LoRA layers over linear weights, by their names in the base model.

    Raises UnsupportedError for a LoRA layer over anything else, or for a variant whose
    update is not s·BA.
    """
    layers: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise UnsupportedError(
                f"{name} is LoRA over {type(base).__name__}; only linear layers are supported"
            )
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
            if adapter in layer.lora_A.keys():
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def _trained_sites(model: nn.Module) -> dict[str, Site]:
    sites: dict[int, Site] = {}
    claimed: set[int] = set()
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
        trains_weight = weight is not None and weight.requires_grad
        trains_bias = bias is not None and bias.requires_grad
        if not (trains_weight or trains_bias):
            continue
        claimed |= {id(p) for p in (weight, bias) if p is not None}
        _add_site(sites, id(weight), Site(inner_name(name), (module,), trains_weight, trains_bias))
    _refuse_unclaimed(model, claimed)
    if not sites:
        raise UnsupportedError("the model has no trainable parameter, so there is no gradient to score by")
    return {site.name: site for site in sites.values()}


def _add_site(sites: dict[int, Site], key: int, site: Site) -> None:
    """Adds a site; a weight used by two modules (tied) stays one site, its gradients summed."""
    if key not in sites:
        sites[key] = site
        return
    first = sites[key]
    if first.bias or site.bias:
        raise UnsupportedError(
            f"{site.name} shares its weight with {first.name}, and one of them trains a bias"
        )
    sites[key] = replace(first, modules=first.modules + site.modules)


def _is_linear(module: nn.Module) -> bool:
    # A subclass that computes something else must not be taken for y = x Wᵀ + b.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    if is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index,union-attr]
    return getattr(module, name)


def _refuse_unclaimed(model: nn.Module, claimed: set[int]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in claimed:
            owner = model.get_submodule(name.rpartition(".")[0])
            raise UnsupportedError(
                f"{name} trains, and it belongs to a {type(owner).__name__}, whose gradient per sample is not "
                "known exactly; freeze it, or train linear layers and LoRA only"
            )


def batch_coupled(model: nn.Module) -> Iterator[str]:
    """Names of what makes one sample's loss depend on the others of its batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield f"{name} ({type(module).__name__})"
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        yield "the auxiliary loss of a mixture of experts (config.output_router_logits)"
