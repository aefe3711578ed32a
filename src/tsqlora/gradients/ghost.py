"""Per-sample gradients of linear layers: norms, dot products and steps, without a loop.

For one sample with inputs a (t × i) and output gradients b (t × o) the weight's gradient is
bᵀa. It is kept in whichever form is smaller and cheaper: *explicit*, the o × i matrix, or
*factored*, the pair (a, b). Both criteria give the same answer: factored when
t·(i + o) < i·o.  METHOD section 1; the factored norm is Li et al. (2022), ghost clipping.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable  # for beartype, which checks annotations while tests run
class WeightGradient(Protocol):
    """The gradient of one weight for each of n samples."""

    def norm_sq(self) -> Float[Tensor, " n"]:
        """Squared Frobenius norm of each sample's gradient."""
        ...

    def dot(self, other: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
        """Inner product of each sample's gradient with one matrix."""
        ...

    def apply(self, x: Float[Tensor, "n t i"]) -> Float[Tensor, "n t o"]:
        """x ∇Wᵀ, each sample with its own gradient: what a unit step takes from the output."""
        ...


@dataclass(frozen=True, slots=True)
class Explicit:
    """Each sample's gradient as a matrix; cheapest for the thin matrices of LoRA."""

    weight: Float[Tensor, "n o i"]

    def norm_sq(self) -> Float[Tensor, " n"]:
        return wide(self.weight).square().sum((1, 2))

    def dot(self, other: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
        return wide(self.weight).flatten(1) @ other.flatten()

    def apply(self, x: Float[Tensor, "n t i"]) -> Float[Tensor, "n t o"]:
        return x @ self.weight.mT.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Factored:
    """Each sample's gradient as the pair whose product it is; no o × i matrix exists."""

    a: Float[Tensor, "n t i"]
    b: Float[Tensor, "n t o"]

    def norm_sq(self) -> Float[Tensor, " n"]:
        # ‖bᵀa‖² = ⟨aaᵀ, bbᵀ⟩. Rounding may leave it a hair below zero.
        gram = wide(self.a @ self.a.mT) * wide(self.b @ self.b.mT)
        return gram.sum((1, 2)).clamp_min(0)

    def dot(self, other: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
        return (wide(self.a @ other.mT.to(self.a.dtype)) * wide(self.b)).sum((1, 2))

    def apply(self, x: Float[Tensor, "n t i"]) -> Float[Tensor, "n t o"]:
        return (x @ self.a.mT.to(x.dtype)) @ self.b.to(x.dtype)


def weight_gradient(a: Float[Tensor, "n t i"], b: Float[Tensor, "n t o"]) -> WeightGradient:
    """Each sample's weight gradient bᵀa, in the cheaper of its two forms."""
    a = a.to(b.dtype)
    if factored_is_cheaper(tokens=a.shape[1], inputs=a.shape[2], outputs=b.shape[2]):
        return Factored(a, b)
    return Explicit(b.mT @ a)


def factored_is_cheaper(*, tokens: int, inputs: int, outputs: int) -> bool:
    """Whether t²(i + o) operations and t(i + o) numbers are fewer than t·i·o and i·o."""
    return tokens * (inputs + outputs) < inputs * outputs


@dataclass(frozen=True, slots=True)
class MeanGradient:
    """The gradient of one layer, summed or averaged over samples: weight o × i and bias o."""

    weight: Float[Tensor, "o i"] | None
    bias: Float[Tensor, " o"] | None

    def norm_sq(self) -> Float[Tensor, ""]:
        parts = [p.square().sum() for p in (self.weight, self.bias) if p is not None]
        return torch.stack(parts).sum()

    def scaled(self, factor: float) -> "MeanGradient":
        return MeanGradient(
            None if self.weight is None else self.weight * factor,
            None if self.bias is None else self.bias * factor,
        )

    def plus(self, other: "MeanGradient") -> "MeanGradient":
        return MeanGradient(_add(self.weight, other.weight), _add(self.bias, other.bias))


@dataclass(frozen=True, slots=True)
class LayerGradient:
    """Each sample's gradient of one linear layer: of its weight, its bias, or both."""

    weight: WeightGradient | None
    bias: Float[Tensor, "n o"] | None

    def norm_sq(self) -> Float[Tensor, " n"]:
        parts: list[Tensor] = []
        if self.weight is not None:
            parts.append(self.weight.norm_sq())
        if self.bias is not None:
            parts.append(wide(self.bias).square().sum(1))
        return torch.stack(parts).sum(0)

    def dot(self, mean: MeanGradient) -> Float[Tensor, " n"]:
        parts: list[Tensor] = []
        if self.weight is not None and mean.weight is not None:
            parts.append(self.weight.dot(mean.weight))
        if self.bias is not None and mean.bias is not None:
            parts.append(wide(self.bias) @ mean.bias)
        return torch.stack(parts).sum(0)

    def apply(self, x: Float[Tensor, "n t i"]) -> Float[Tensor, "n t o"]:
        """What a unit step of each sample takes from the layer's output for x."""
        parts: list[Tensor] = []
        if self.weight is not None:
            parts.append(self.weight.apply(x))
        if self.bias is not None:
            parts.append(self.bias[:, None, :].to(x.dtype).expand(-1, x.shape[1], -1))
        return sum(parts[1:], start=parts[0])


def layer_gradient(a: Float[Tensor, "n t i"], b: Float[Tensor, "n t o"], *, weight: bool, bias: bool) -> LayerGradient:
    """Each sample's gradient of the parts of a linear layer that belong to θ."""
    return LayerGradient(
        weight_gradient(a, b) if weight else None,
        wide(b).sum(1) if bias else None,
    )


def summed_gradient(a: Float[Tensor, "n t i"], b: Float[Tensor, "n t o"], *, weight: bool, bias: bool) -> MeanGradient:
    """The same, summed over the samples of the batch: one matrix product."""
    a = a.to(b.dtype)
    return MeanGradient(
        wide(b.flatten(0, 1).mT @ a.flatten(0, 1)) if weight else None,
        wide(b).sum((0, 1)) if bias else None,
    )


def wide(x: Tensor) -> Tensor:
    """Half precision raised to float32, everything else as it is: sums must not round."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x + y
