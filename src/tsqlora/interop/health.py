"""What the numbers of an adapter say by themselves: NaN, slots that do nothing, the rank that is really used."""

from dataclasses import dataclass

import numpy as np

from tsqlora.errors import DataError
from tsqlora.interop.lora import LoraAdapter, Target
from tsqlora.interop.rewrite import decompose
from tsqlora.interop.tensors import Array

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes (vllm/config/lora.py, 0.30 to 0.33; it takes 1, too)."""


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """One layer's numbers.

    Attributes:
        nonfinite: NaN and infinite numbers in A and B; with any, the others are 0.
        zero: slots whose row of A or column of B is zero.
        duplicate: slots beyond these that add no direction: the rank of BA is lower by as many.
        effective: exp of the entropy of the singular values of BA, normalised to sum 1
            (Roy and Vetterli, 2007): between 1 and the rank, 0 for a layer that does nothing.
        norm: ‖ΔW‖, Frobenius.
    """

    rank: int
    nonfinite: int
    zero: int
    duplicate: int
    effective: float
    norm: float


def layer_health(target: Target) -> LayerHealth:
    """A layer's numbers.  Singular values below 1e-6 of the largest count as none: directions of float16 at best."""
    broken = sum(_nonfinite(matrix) for matrix in (target.a, target.b))
    if broken or not target.rank:
        return LayerHealth(target.rank, broken, 0, 0, 0.0, 0.0)
    alive = int(target.used().sum())
    _, singular, _ = decompose(target)
    used = singular[singular > 1e-6 * singular[0]]
    shares = used / used.sum()
    effective = float(np.exp(-(shares * np.log(shares)).sum())) if len(used) else 0.0
    norm = abs(target.scale) * float(np.linalg.norm(singular))
    return LayerHealth(target.rank, 0, target.rank - alive, max(alive - len(used), 0), effective, norm)


def nonfinite(adapter: LoraAdapter) -> dict[str, int]:
    """How many numbers are NaN or infinite in each target and in each tensor beside them, where there are any."""
    counts = {name: _nonfinite(target.a) + _nonfinite(target.b) for name, target in adapter.targets.items()}
    others = {**adapter.saved, **adapter.further}
    counts |= {name: _nonfinite(tensor.numbers()) for name, tensor in others.items() if tensor.is_float}
    return {name: count for name, count in counts.items() if count}


def _nonfinite(numbers: Array) -> int:
    return int((~np.isfinite(numbers)).sum())


def require_finite(adapter: LoraAdapter) -> None:
    """Raises DataError, naming the layer, for NaN and infinite numbers."""
    if found := nonfinite(adapter):
        raise DataError(f"{next(iter(found))} has numbers that are not finite; `tsqlora doctor` shows all that have")


def vllm_rank(rank: int) -> int | None:
    """The value of --max-lora-rank that vLLM needs for an adapter of this rank; None where there is none.

    >>> vllm_rank(5), vllm_rank(9), vllm_rank(600)
    (8, 16, None)
    """
    return next((value for value in VLLM_RANKS if value >= rank), None)
