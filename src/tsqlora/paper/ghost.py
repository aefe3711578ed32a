"""Per-sample weight gradients: norms, dot products and steps, without a loop.

For one sample with inputs a (t × i) and output gradients b (t × o) the weight's gradient is bᵀa. It is stored in the
smaller and cheaper form: *explicit*, the o × i matrix, or *factored*, the pair (a, b), when t·(i + o) < i·o.
The factored norm is Li et al. (2022), ghost clipping.  A norm layer's gain has a vector as gradient, an
Embedding the gradients of its outputs by index.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tsqlora.libs.shapes import Float, Int, Shaped
from tsqlora.libs.torch import upcast

MOST_AT_ONCE = 2**24
"""Entries of an n × t × t product in memory at once: 64 MiB in float32. Longer samples are split."""


@dataclass(frozen=True, slots=True)
class Explicit:
    """Each sample's gradient as a matrix; cheapest for the thin matrices of LoRA."""

    weight: Float[Tensor, "n o i"]

    def norm_sq(self) -> Float[Tensor, " n"]:
        norm: Tensor = cast(Any, torch.linalg).vector_norm(self.weight, dim=(1, 2), dtype=upcast(self.weight).dtype)
        return norm.square()

    def dot(self, other: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
        return upcast(self.weight).flatten(1) @ other.flatten()

    def apply(self, x: Float[Tensor, "n t i"]) -> Float[Tensor, "n t o"]:
        return x @ self.weight.mT.to(x.dtype)

    def look_up(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t i"]:
        """Return rows of each sample's gradient, to step an Embedding that shares a linear layer's weight."""
        return self.weight.gather(1, ids[..., None].expand(-1, -1, self.weight.shape[2]))


@dataclass(frozen=True, slots=True)
class Factored:
    """Each sample's gradient as the pair (a, b), without the o × i product."""

    a: Float[Tensor, "n t i"]
    b: Float[Tensor, "n t o"]

    def norm_sq(self) -> Float[Tensor, " n"]:
        # ‖bᵀa‖² = ⟨aaᵀ, bbᵀ⟩. Rounding may leave it a hair below zero.
        pairs = zip(_parts(self.a, self.a.shape[1]), _parts(self.b, self.a.shape[1]), strict=True)
        grams = [(upcast(a @ self.a.mT) * upcast(b @ self.b.mT)).sum((1, 2)) for a, b in pairs]
        return torch.stack(grams).sum(0).clamp_min(0)

    def dot(self, other: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
        return (upcast(self.a @ other.mT.to(self.a.dtype)) * upcast(self.b)).sum((1, 2))

    def apply(self, x: Float[Tensor, "n t i"]) -> Float[Tensor, "n t o"]:
        a, b = self.a.mT.to(x.dtype), self.b.to(x.dtype)
        return _in_parts(lambda rows: (rows @ a) @ b, x, self.a.shape[1])

    def look_up(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t i"]:
        return self.b.gather(2, ids[:, None, :].expand(-1, self.b.shape[1], -1)).mT @ self.a


@dataclass(frozen=True, slots=True)
class VectorGradient:
    """Each sample's gradient of a vector that multiplies the normalised input per feature, or of a bias."""

    weight: Float[Tensor, "n o"]
    multiplies: bool

    def norm_sq(self) -> Float[Tensor, " n"]:
        return self.weight.square().sum(1)

    def dot(self, other: Float[Tensor, " o"]) -> Float[Tensor, " n"]:
        return self.weight @ other

    def apply(self, x: Float[Tensor, "n t *i"]) -> Float[Tensor, "n t o"]:
        change = self.weight[:, None, :].to(x.dtype)
        return x * change if self.multiplies else change.expand(-1, x.shape[1], -1)


@dataclass(frozen=True, slots=True)
class LookupGradient:
    """Each sample's gradient of an Embedding: row v is the sum of b over the tokens that are v."""

    ids: Int[Tensor, "n t"]
    b: Float[Tensor, "n t o"]

    def norm_sq(self) -> Float[Tensor, " n"]:
        return (upcast(self.look_up(self.ids)) * upcast(self.b)).sum((1, 2)).clamp_min(0)

    def dot(self, other: Float[Tensor, "v o"]) -> Float[Tensor, " n"]:
        return (other[self.ids] * upcast(self.b)).sum((1, 2))

    def apply(self, x: Int[Tensor, "n t"]) -> Float[Tensor, "n t o"]:
        return self.look_up(x)

    def look_up(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t o"]:
        """Return rows of each sample's gradient."""
        return _in_parts(
            lambda part: (part[:, :, None] == self.ids[:, None, :]).to(self.b) @ self.b, ids, self.b.shape[1]
        )


WeightGradient = Explicit | Factored | VectorGradient | LookupGradient
"""The gradient of one weight or bias for each of n samples.

`norm_sq` is the squared Frobenius norm of each sample's gradient, `dot` its inner product with a tensor of the weight's
shape, and `apply` the change of the layer's output on x after one SGD step with lr 1 on each sample: x ∇Wᵀ if linear.
"""


def _parts(x: Shaped[Tensor, "n t *i"], tokens: int) -> tuple[Tensor, ...]:
    """Split x along tokens so that a product with `tokens` others has at most MOST_AT_ONCE entries."""
    at_once = max(1, MOST_AT_ONCE // max(1, x.shape[0] * tokens))
    return torch.split(x, at_once, dim=1)


def _in_parts(work: Callable[[Tensor], Tensor], x: Shaped[Tensor, "n t *i"], tokens: int) -> Tensor:
    """Apply `work` to x in parts along tokens."""
    results = [work(part) for part in _parts(x, tokens)]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def weight_gradient(a: Float[Tensor, "n t i"], b: Float[Tensor, "n t o"]) -> WeightGradient:
    """Return each sample's weight gradient bᵀa in the cheaper of its two forms."""
    a = a.to(b.dtype)
    tokens, inputs, outputs = *a.shape[1:], b.shape[2]
    return Factored(a, b) if tokens * (inputs + outputs) < inputs * outputs else Explicit(b.mT @ a)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ: a is the input."""

    def gradient(self, a: Float[Tensor, "n t i"], b: Float[Tensor, "n t o"]) -> WeightGradient:
        return weight_gradient(a, b)

    def summed(self, a: Float[Tensor, "n t i"], b: Float[Tensor, "n t o"]) -> Float[Tensor, "o i"]:
        return upcast(b.flatten(0, 1).mT @ a.to(b.dtype).flatten(0, 1))


@dataclass(frozen=True, slots=True)
class Gain:
    """y = x̂ ⊙ w: a is the normalised input x̂."""

    def gradient(self, a: Float[Tensor, "n t o"], b: Float[Tensor, "n t o"]) -> VectorGradient:
        return VectorGradient((upcast(a) * upcast(b)).sum(1), multiplies=True)

    def summed(self, a: Float[Tensor, "n t o"], b: Float[Tensor, "n t o"]) -> Float[Tensor, " o"]:
        return (upcast(a) * upcast(b)).sum((0, 1))


@dataclass(frozen=True, slots=True)
class Lookup:
    """y = W[ids]: a is the indices."""

    rows: int

    def gradient(self, a: Int[Tensor, "n t"], b: Float[Tensor, "n t o"]) -> LookupGradient:
        return LookupGradient(a, b)

    def summed(self, a: Int[Tensor, "n t"], b: Float[Tensor, "n t o"]) -> Float[Tensor, "v o"]:
        b = upcast(b).flatten(0, 1)
        return b.new_zeros(self.rows, b.shape[1]).index_add_(0, a.flatten(), b)


Kind = Linear | Gain | Lookup
"""How a weight's gradient follows from the layer's input a and the output gradient b.

`gradient` is that of each sample, `summed` the sum over the batch in the weight's shape.
"""

LINEAR = Linear()


MeanGradient = list[Float[Tensor, "..."]]
"""The gradient of one layer's weight, then of its bias, whichever train: summed or averaged over samples."""


def norm_sq(mean: MeanGradient) -> Float[Tensor, ""]:
    """Return the squared norm of a layer's gradient."""
    return torch.stack([part.square().sum() for part in mean]).sum()


@dataclass(frozen=True, slots=True)
class LayerGradient:
    """Each sample's gradient of one layer's weight, then of its bias, whichever train."""

    parts: list[WeightGradient]

    def norm_sq(self) -> Float[Tensor, " n"]:
        return torch.stack([part.norm_sq() for part in self.parts]).sum(0)

    def dot(self, mean: MeanGradient) -> Float[Tensor, " n"]:
        return torch.stack([part.dot(other) for part, other in zip(self.parts, mean, strict=True)]).sum(0)

    def apply(self, x: Shaped[Tensor, "n t *i"]) -> Float[Tensor, "n t o"]:
        """Return the change of the layer's output on x after one SGD step with lr 1 on each sample."""
        first, *others = [part.apply(x) for part in self.parts]
        return sum(others, first)


def layer_gradient(
    a: Shaped[Tensor, "n t *i"], b: Float[Tensor, "n t o"], *, weight: bool, bias: bool, kind: Kind = LINEAR
) -> LayerGradient:
    """Return each sample's gradient of the parts of a layer that belong to θ."""
    parts = [kind.gradient(a, b)] if weight else []
    return LayerGradient([*parts, VectorGradient(upcast(b).sum(1), multiplies=False)] if bias else parts)


def summed_gradient(
    a: Shaped[Tensor, "n t *i"], b: Float[Tensor, "n t o"], *, weight: bool, bias: bool, kind: Kind = LINEAR
) -> MeanGradient:
    """Return the gradient summed over the samples of the batch."""
    parts = [kind.summed(a, b)] if weight else []
    return [*parts, upcast(b).sum((0, 1))] if bias else parts
