"""Check an adapter's numbers: NaN, slots without effect, effective rank, and whether it does anything at all."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tsqlora.adapter.lora import LoraAdapter, Target
from tsqlora.adapter.rewrite import decompose
from tsqlora.adapter.tensors import Array, Stored
from tsqlora.errors import DataError, Finding

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


CURES = {
    "not finite": "training diverged: take an earlier checkpoint, or train at a lower learning rate",
    "every update is zero": "it was not trained, or was saved before training; check that lora_B gets a gradient and a "
    "learning rate",
    "a trained module is not in the file": "it was trained, but not saved; save the adapter with the PEFT model's "
    "save_pretrained",
    "tied weights were saved twice": "the base has one weight for both, and {how}, or train with PEFT's "
    "ensure_weight_tying",
    "no key matches the base": "it was trained on another model; name that one as the base",
    "shapes differ from the base": "it was trained on a base of another size; if the vocabulary was enlarged before "
    "training (resize_token_embeddings), save that base and name it",
}
"""Every fault of an adapter that can be read, with its cure."""


def faults(
    adapter: LoraAdapter,
    base: Mapping[str, tuple[int, ...]],
    *,
    tied: bool = False,
    other: Sequence[tuple[str, int]] = (),
) -> list[Finding]:
    """Why the adapter does nothing, or breaks its base.

    Args:
        base: the shape of each weight of the base, by its module's name in the checkpoint; may be empty.
        tied: the base's head shares the weight of its embedding.
        other: what `resized` finds.
    """
    layers, how = dict[str, Iterable[str]](), ""
    if counts := nonfinite(adapter):
        layers["not finite"] = counts
    elif not (adapter.saved or adapter.further or any(t.used().any() and t.scale for t in adapter.targets.values())):
        layers["every update is zero"] = ()
    if absent := _not_in_file(adapter):
        layers["a trained module is not in the file"] = absent
    pair = {name: t for name, t in _weights(adapter).items() if _in_block(name) in ("embed_tokens", "lm_head", "wte")}
    if tied and len(pair) == 2:
        one, copy = pair.values()
        same = one.dtype == copy.dtype and np.array_equal(one.raw, copy.raw)
        apart = "they were trained apart: `tsqlora export --format merged` keeps both"
        how = "the copies are the same: save one of them" if same else apart
        layers["tied weights were saved twice"] = pair
    # transformers renames what stands before the blocks of some checkpoints; towers may have layers of one name.
    shapes = dict[str, list[tuple[int, ...]]]()
    for name, shape in base.items():
        shapes.setdefault(_in_block(name), []).append(shape)
    sizes = {name: (target.outputs, target.inputs) for name, target in adapter.targets.items() if target.rank}
    sizes |= {name: t.shape for name, t in _weights(adapter).items() if "embed" in name or "lm_head" in name}
    different = [
        f"{name} is {' × '.join(map(str, size))}, the base's {' × '.join(map(str, its[0]))}"
        for name, size in sizes.items()
        if (its := shapes.get(_in_block(name))) and all(len(one) == 2 and sorted(one) != sorted(size) for one in its)
    ]
    if shapes and adapter.targets and not any(_in_block(name) in shapes for name in adapter.targets):
        layers["no key matches the base"] = different = ()
    if different := different or [f"{name} has {rows:,} tokens" for name, rows in other]:
        layers["shapes differ from the base"] = different
    return [Finding(name, "fault", tuple(where), cure=CURES[name].format(how=how)) for name, where in layers.items()]


def resized(adapter: LoraAdapter, size: int) -> list[tuple[str, int]]:
    """Embeddings and heads of the adapter with another number of tokens than `size`, and that number."""
    rows = {name: t.shape[0] for name, t in _weights(adapter).items() if name.endswith(("embed_tokens", "lm_head"))}
    rows |= {n: t.shape[0] for n, t in adapter.base_layers.items() if "embed_tokens" in n or "lm_head" in n}
    rows |= {name: target.inputs for name, target in adapter.targets.items() if target.kind == "embedding"}
    rows |= {name: target.outputs for name, target in adapter.targets.items() if name.endswith("lm_head")}
    return [(name, count) for name, count in rows.items() if count != size]


def _not_in_file(adapter: LoraAdapter) -> list[str]:
    """What the config says was trained beside the layers, but has no tensor."""
    whole = adapter.config.get("modules_to_save") or []
    names = {name for name in whole if any(f".{name}." in f".{key}" for key in adapter.saved)}
    # PEFT always names two heads of a classifier, of which a model has at most one.
    absent = [name for name in whole if name not in names and not (name in _HEADS and names)]
    if adapter.config.get("trainable_token_indices") and not any("trainable_tokens" in key for key in adapter.further):
        absent.append("trainable_token_indices")
    return absent


_HEADS = ("classifier", "score")


def _in_block(name: str) -> str:
    """The name of a layer from the number of its block on; without a number its last part.

    >>> _in_block("model.language_model.layers.3.mlp.up_proj"), _in_block("lm_head")
    ('3.mlp.up_proj', 'lm_head')
    """
    parts = name.split(".")
    return ".".join(parts[next((j for j, part in enumerate(parts) if part.isdigit()), -1) :])


def _weights(adapter: LoraAdapter) -> dict[str, Stored]:
    """The weights of modules that were saved in full, by the modules' names."""
    return {name.removesuffix(".weight"): t for name, t in adapter.saved.items() if name.endswith(".weight")}


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
