"""Sites: the modules whose calls show the gradient of each parameter of θ.

A site is a weight (and bias) with the modules that use it. Sites of trainable parameters are LoRA's A and B, which PEFT
stores as two linear layers, the task head, and other unfrozen layers. A target site is the frozen weight of a target
layer, captured at the whole LoRA layer.

Three kinds of layers. Linear (nn.Linear, and transformers' Conv1D, whose weight is transposed): inputs a. Gain
(LayerNorm, RMSNorm, any layer that is affine in a vector with one weight per feature): the normalised input. Lookup
(Embedding): the indices.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeGuard, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from tsqlora.errors import UnsupportedError
from tsqlora.libs.bitsandbytes import dequantised, is_packed_for_inference, linear_bits
from tsqlora.libs.peft import dequantize_module_weight, has_variant, lora_matrices
from tsqlora.libs.shapes import Float
from tsqlora.libs.torch import with_weight
from tsqlora.model.modules import BATCH_NORMS, inner_name, is_linear
from tsqlora.paper.ghost import LINEAR, Gain, Kind, LayerGradient, Linear, Lookup


class Parts(TypedDict):
    """The parts of a layer that belong to θ, as keywords of `layer_gradient`."""

    weight: bool
    bias: bool
    kind: Kind


@dataclass(frozen=True, slots=True)
class Site:
    """One weight of θ, the modules that use it, and which of its parts belong to θ."""

    name: str
    modules: tuple[nn.Module, ...]
    weight: bool
    bias: bool
    kind: Kind = LINEAR

    @property
    def parts(self) -> Parts:
        return {"weight": self.weight, "bias": self.bias, "kind": self.kind}


def seen(site: Site, module: nn.Module, x: Tensor, grad: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Return (a, b) of one call on x whose output has this gradient."""
    module = module.get_base_layer() if isinstance(module, LoraLayer) else module
    a = input_of(module, site.kind, x, samples, site.name)
    b = by_sample(grad, samples, site.name)
    if is_embedding(module) and module.padding_idx is not None:  # whose row does not train
        b = b.masked_fill((x == module.padding_idx).reshape(*b.shape[:2], 1), 0)
    if not _mixed(site, module):
        return a, b
    # An Embedding that shares a linear layer's weight: a one-hot b makes ∇W a sum of outer products again. In b's dtype
    # it is as large as the gradient of the logits; F.one_hot would return int64.
    return b, b.new_zeros(*a.shape, cast(nn.Embedding, module).num_embeddings).scatter_(-1, a.unsqueeze(-1), 1)


def stepped_output(site: Site, module: nn.Module, gradient: LayerGradient, x: Tensor, samples: int) -> Tensor:
    """Return the change of the output of a call on x after one step with lr 1 on each sample."""
    a = input_of(module, site.kind, x, samples, site.name)
    if _mixed(site, module):
        return cast(Any, gradient.parts[0]).look_up(a)
    return gradient.apply(a)


def _mixed(site: Site, module: nn.Module) -> bool:
    """Whether the module is an Embedding that shares its weight with a linear layer."""
    return is_embedding(module) and isinstance(site.kind, Linear)


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return the sites of θ by name.

    Raises UnsupportedError naming the first parameter of θ without an exact gradient per sample; none is skipped.
    """
    sites: dict[int, Site] = {}
    biases: dict[int, str] = {}
    seen: set[tuple[int, int]] = set()
    modules = _modules(model)
    for name, module in modules:
        weight, bias = _trained(module, "weight"), _trained(module, "bias")
        kind = None if weight is None and bias is None else kind_of(module)
        if kind is None:
            continue
        seen |= {(id(part[0]), id(part[1])) for part in (weight, bias) if part is not None}
        site = Site(inner_name(name), (module,), weight is not None, bias is not None, kind)
        key = id(module) if weight is None else id(weight[1])
        sites[key] = site if key not in sites else _tied(sites[key], site)
        if bias is not None and biases.setdefault(id(bias[1]), site.name) != site.name:
            raise UnsupportedError(f"{site.name} shares its trained bias with {biases[id(bias[1])]}; freeze it")
    for owner_name, owner in modules:
        for name, parameter in owner.named_parameters(owner_name, recurse=False):
            if not parameter.requires_grad or (id(owner), id(parameter)) in seen:
                continue
            if ".lora_embedding_" in f".{name}":
                raise UnsupportedError(
                    f"{name} trains, and LoRA over an Embedding has no exact gradient per sample; remove the "
                    "Embedding from target_modules"
                )
            raise UnsupportedError(
                f"{name} trains and belongs to {type(owner).__name__}, which has no exact gradient per sample; "
                "freeze it, or train only linear layers, embeddings, norms and LoRA"
            )
    if not sites:
        raise UnsupportedError("the model has no trainable parameter and so no gradient to score by")
    return {site.name: site for site in sites.values()}


def target_site(name: str, layer: LoraLayer) -> Site:
    """Return the site of the weight under a LoRA layer, and of its bias if that trains: the whole layer."""
    base = cast(Any, layer.get_base_layer())
    kind = Lookup(base.num_embeddings) if isinstance(base, nn.Embedding) else LINEAR
    bias = getattr(base, "bias", None)
    return Site(name, (cast(nn.Module, layer),), True, isinstance(bias, Tensor) and bias.requires_grad, kind)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the model's LoRA layers over linear layers and embeddings, by name in the base model.

    Raises UnsupportedError for LoRA over any other layer, and for variants whose update is not s·BA.
    """
    layers: dict[str, LoraLayer] = {}
    for name, module in _modules(model):
        if not isinstance(module, LoraLayer):
            continue
        name, base = inner_name(name), module.get_base_layer()
        assert isinstance(base, nn.Module)
        if not (is_linear(base) or is_embedding(base) or linear_bits(base)):
            raise UnsupportedError(
                f"{name} is LoRA over {type(base).__name__}, which is not a plain linear layer or embedding; remove it "
                "from target_modules"
            )
        if has_variant(module):
            raise UnsupportedError(f"{name} uses a LoRA variant (DoRA or lora_bias); use plain LoRA")
        layers[name] = module
    return layers


def effective_weight(layer: LoraLayer, *, every: int = 1) -> Float[Tensor, "o i"]:
    """Return W + s·BA of a LoRA layer, dequantised; with `every` = k only every k-th output."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Module)
    if is_packed_for_inference(base):
        raise UnsupportedError(
            "bitsandbytes has packed a 4-bit weight for CPU inference, which blocks gradients; reload the model and "
            "wrap it before its first evaluation"
        )
    weight: Tensor = dequantised(base) if linear_bits(base) else dequantize_module_weight(base).detach()
    weight = (weight.T if isinstance(base, Conv1D | nn.Embedding) else weight)[::every]
    if not (layer.disable_adapters or layer.merged):
        with torch.no_grad():
            for adapter in layer.active_adapters:
                if adapter in cast(Any, layer).r:
                    down, up = lora_matrices(layer, adapter)
                    scale: float = cast(Any, layer).scaling[adapter]
                    weight = weight + (scale * (up[::every] @ down)).to(weight.dtype)
    return weight


def _tied(first: Site, second: Site) -> Site:
    """Merge two modules that share a weight into one site, whose gradients are summed."""
    if first.bias or second.bias:
        raise UnsupportedError(f"{second.name} shares its weight with {first.name}, and one of them trains a bias")
    kind = first.kind if first.kind == second.kind else LINEAR
    modules = first.modules + second.modules
    if not all(is_embedding(m) or is_linear(m) for m in modules) and first.kind != second.kind:
        raise UnsupportedError(f"{second.name} shares its weight with {first.name}, a layer of another kind; untie it")
    return replace(first, modules=modules, kind=kind)


def _trained(module: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter] | None:
    """Return a layer's weight or bias and the module that holds it, if it trains.

    A parametrisation holds the tensor in a submodule; the gradients agree only if it selects entries, as rank slots do,
    which scoring measures.
    """
    key = name
    if is_parametrized(module, name):
        module, key = module.get_submodule(f"parametrizations.{name}"), "original"
    parameter = dict(module.named_parameters(recurse=False)).get(key)
    return (module, parameter) if parameter is not None and parameter.requires_grad else None


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """named_modules(), with a type."""
    return [*cast("Iterator[tuple[str, nn.Module]]", model.named_modules())]


def kind_of(module: nn.Module) -> Kind | None:
    """Return how the gradient of a layer's weight and bias follows from one call; None for an unsupported layer."""
    if is_linear(module):
        return Linear()
    if is_embedding(module):
        return Lookup(module.num_embeddings)
    if isinstance(module, BATCH_NORMS) or list(module.children()):
        return None
    # A layer may be affine in a vector of weights; scoring measures whether it is (paper/exact.py).
    own = dict(module.named_parameters(recurse=False))
    plain = "weight" in own and not own.keys() - {"weight", "bias"} and all(p.dim() == 1 for p in own.values())
    return Gain() if plain and len(inspect.signature(module.forward).parameters) == 1 else None


def is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether the layer only looks up rows: max_norm changes them, scale_grad_by_freq couples samples."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def input_of(module: nn.Module, kind: Kind, x: Tensor, samples: int, name: str) -> Tensor:
    """Return the input that a gradient of this kind needs from a call on x: n × t × i, or indices n × t.

    Raises UnsupportedError for inputs whose first dimension is not the batch.
    """
    if is_embedding(module):
        return by_sample(x.unsqueeze(-1), samples, name).squeeze(-1)
    if isinstance(kind, Gain):  # ∂y/∂weight of a layer that is affine in its weight: its output at 1 minus that at 0
        weight: Tensor = module.get_parameter("weight")
        if x.shape[-1] != len(weight):
            raise UnsupportedError(
                f"{name} ({type(module).__name__}) has {len(weight)} weights for an input of shape {tuple(x.shape)}, "
                "not one per feature, so that its gradient per sample is not exact; freeze it"
            )
        with torch.no_grad():
            fills = (torch.ones_like, torch.zeros_like)
            ones, zeros = (with_weight(module, fill(weight)).forward(x.to(weight)) for fill in fills)
        x = ones - zeros
    return by_sample(x, samples, name)


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first argument of a call, positional or by keyword."""
    return next(iter((*args, *kwargs.values())))


def by_sample(x: Tensor, samples: int, name: str) -> Tensor:
    """Reshape x to n × t × features: all dimensions between the first and the last are tokens."""
    if x.dim() < 2 or x.shape[0] != samples:
        raise UnsupportedError(
            f"{name} is called on a tensor of shape {tuple(x.shape)} in a batch of {samples}, which mixes samples; "
            "give the layer inputs whose first dimension is the batch"
        )
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
