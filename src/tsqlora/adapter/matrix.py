"""A and B of a LoRA layer, and the parametrisation that shows a prefix of their slots."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, type_before_parametrizations

from tsqlora.compat.peft import places_of
from tsqlora.compat.torch import show_directly


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
        self._set_features(capacity)

    def make_plain(self) -> None:
        """Keep the active slots only; the parameter stays the same object."""
        full, rank = self.full, self.prefix.rank
        active = full.detach().narrow(self.dim, 0, rank)
        full.data, full.grad = active.clone(memory_format=torch.contiguous_format), None
        # Not by torch's remove_parametrizations: it takes the property off a class that copies of the module share.
        self.holder.__class__ = type_before_parametrizations(self.holder)
        del self.holder.parametrizations
        setattr(self.holder, self.tensor, full)
        self._set_features(rank)

    def _set_features(self, slots: int) -> None:
        if isinstance(self.holder, nn.Linear):
            setattr(self.holder, ("out_features", "in_features")[self.dim], slots)


def matrices(name: str, layer: LoraLayer, adapter: str) -> tuple[Matrix, Matrix]:
    """A and B of a layer's adapter."""
    (a, name_a, path_a), (b, name_b, path_b) = places_of(layer, adapter)
    path = f"base_model.model.{name}"
    return Matrix(a, name_a, f"{path}.{path_a}", 0), Matrix(b, name_b, f"{path}.{path_b}", 1)
