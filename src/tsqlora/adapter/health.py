"""Check an adapter's numbers: NaN, slots without effect, effective rank."""

from dataclasses import dataclass

import numpy as np

from tsqlora.adapter.lora import LoraAdapter, Target
from tsqlora.adapter.rewrite import decompose
from tsqlora.adapter.tensors import Array
from tsqlora.errors import DataError

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (vllm/config/lora.py, 0.30 to 0.33; 1 is one too)."""


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """One layer's numbers.

    Attributes:
        nonfinite: count of NaN and infinite numbers in A and B; if there are any, the others are 0.
        zero: slots whose row of A or column of B is zero.
        duplicate: other slots that add no direction, so that the rank of BA is lower.
        effective: exp of the entropy of the singular values of BA, normalised to sum 1
            (Roy and Vetterli, 2007): between 1 and the rank, 0 for a layer without effect.
        norm: ‖ΔW‖, Frobenius.
    """

    rank: int
    nonfinite: int
    zero: int
    duplicate: int
    effective: float
    norm: float


def layer_health(target: Target) -> LayerHealth:
    """Measure one layer.  Singular values below 1e-6 of the largest do not count: float16 cannot resolve them."""
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
    """Count NaN and infinite numbers in each target and tensor that has any."""
    counts = {name: _nonfinite(target.a) + _nonfinite(target.b) for name, target in adapter.targets.items()}
    others = {**adapter.saved, **adapter.further}
    counts |= {name: _nonfinite(tensor.numbers()) for name, tensor in others.items() if tensor.is_float}
    return {name: count for name, count in counts.items() if count}


def _nonfinite(numbers: Array) -> int:
    return int((~np.isfinite(numbers)).sum())


def require_finite(adapter: LoraAdapter) -> None:
    """Raise DataError for NaN and infinite numbers."""
    if counts := nonfinite(adapter):
        raise DataError(f"{next(iter(counts))} has NaN or infinite numbers; `tsqlora doctor` lists all such layers")


def vllm_rank(rank: int) -> int | None:
    """vLLM's --max-lora-rank for an adapter of this rank; None if it is too large.

    >>> vllm_rank(5), vllm_rank(9), vllm_rank(600)
    (8, 16, None)
    """
    return next((value for value in VLLM_RANKS if value >= rank), None)
