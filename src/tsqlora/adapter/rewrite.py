"""Rewrite an adapter: drop dead slots, truncate, pad to one rank.  Pure functions; nothing is written."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tsqlora.adapter.config import plain_config
from tsqlora.adapter.files import config_for
from tsqlora.adapter.lora import Kind, LoraAdapter, Target
from tsqlora.adapter.patterns import alpha_for
from tsqlora.adapter.tensors import PRECISIONS, Array, rounded
from tsqlora.errors import DataError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Shape:
    """Inputs and outputs of a base module; an embedding's inputs are its tokens."""

    kind: Kind
    inputs: int
    outputs: int


def require_plain(adapter: LoraAdapter, doing: str) -> None:
    """Raise UnsupportedError for an adapter that is more than s·BA on the base's own weights."""
    if beyond := adapter.variants() or sorted(adapter.further):
        raise UnsupportedError(f"the adapter has {beyond[0]}, which {doing} cannot hold; use --format merged")


def compact(adapter: LoraAdapter) -> LoraAdapter:
    """Drop zero slots and empty targets: PEFT's format at its smallest, with the same ΔW bit for bit.

    Raises SettingsError if nothing is left.
    """
    require_plain(adapter, "a rewritten adapter")
    used = {name: target.used() for name, target in adapter.targets.items()}
    targets = {name: replace(t, a=t.a[used[name]], b=t.b[:, used[name]]) for name, t in adapter.targets.items()}
    return spelled_out(replace(adapter, targets={name: target for name, target in targets.items() if target.rank}))


def spelled_out(adapter: LoraAdapter) -> LoraAdapter:
    """Replace all patterns by the names of modules."""
    return replace(adapter, config=config_for(adapter))


def truncate(adapter: LoraAdapter, ranks: Mapping[str, int]) -> tuple[LoraAdapter, dict[str, float]]:
    """Cut each target to its rank in `ranks` by SVD, and return the loss of those cut, ‖ΔW − ΔW'‖ / ‖ΔW‖.

    No approximation of that rank is better (Eckart and Young, 1936).  A target at rank 0 is dropped.
    """
    require_plain(adapter, "a truncated adapter")
    targets, errors = dict(adapter.targets), dict[str, float]()
    for name, target in adapter.targets.items():
        if target.rank > (rank := ranks[name]):
            left, singular, right = decompose(target)
            total = float(np.square(singular).sum())
            errors[name] = (float(np.square(singular[rank:]).sum()) / total) ** 0.5 if total else 0.0
            root = np.sqrt(singular[:rank])
            a = rounded(root[:, None] * right[:rank], target.dtype).reshape(rank, *target.a.shape[1:])
            b = rounded(left[:, :rank] * root, target.dtype).reshape(target.outputs, rank, *target.b.shape[2:])
            targets[name] = replace(target, a=a, b=b)
    return spelled_out(replace(adapter, targets={name: t for name, t in targets.items() if t.rank})), errors


def ranks_for(adapter: LoraAdapter, left: float) -> dict[str, int]:
    """The ranks that lose least of the update with at most `left` parameters in A and B.

    A direction of layer l is worth (s_l·σ)², and costs as many parameters as l has inputs and outputs. Greedy by worth
    per parameter, which is within one direction of the optimum. Among equal
    directions, the layer whose name sorts first keeps its own.
    """
    costs = {name: target.inputs + target.outputs for name, target in adapter.targets.items()}
    worth = []
    for name, target in adapter.targets.items():
        _, singular, _ = decompose(target)
        worth += [(-((target.scale * float(value)) ** 2) / costs[name], name) for value in singular if value > 0]
    ranks = dict.fromkeys(adapter.targets, 0)
    for _, name in sorted(worth):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def decompose(target: Target) -> tuple[Array, Array, Array]:
    """SVD of BA without s, in float64: o × r, r descending singular values, r × i.  Never forms o × i.

    Raises DataError if BA overflows, where LAPACK might not return.
    """
    a, b = target.matrices()
    qa, ra = np.linalg.qr(a.T)
    qb, rb = np.linalg.qr(b)
    with np.errstate(over="ignore", invalid="ignore"):
        product = rb @ ra.T
    if not np.isfinite(product).all():
        raise DataError("the weights of an adapted layer are so large that B·A overflows; check how they were saved")
    left, singular, right = np.linalg.svd(product, full_matrices=False)
    return qb @ left, singular, right @ qa.T


def universal(adapter: LoraAdapter, shapes: Mapping[str, Shape], names: Collection[str]) -> LoraAdapter:
    """One rank, one alpha, no patterns, no rsLoRA: each kind of target in every layer, padded with zeros.

    Layers that a server stacks with a target are added. If scales differ, all but the most common are folded into B,
    in float32; otherwise ΔW is the same bit for bit.

    Args:
        shapes: the base's modules that LoRA can adapt. `names`: all of its modules.

    Raises UnsupportedError if the form cannot hold the adapter, DataError for targets that the base lacks.
    """
    require_plain(adapter, "the universal form")
    for name, target in adapter.targets.items():
        if target.kind == "convolution":
            raise UnsupportedError(f"{name} is a convolution, which the universal form cannot hold; use --format peft")
        require_fits(name, target, shapes)
    kinds = {layer_kind(name) for target in adapter.targets for name in (target, *partners(target))}
    filled = {name: shape for name, shape in shapes.items() if layer_kind(name) in kinds}
    rank = served_rank(adapter.rank)
    scale = commonest_scale(adapter.targets.values())
    dtypes = {target.dtype for target in adapter.targets.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    # Shared by all layers of a shape: an adapter of one layer may imply a thousand.
    numpy = PRECISIONS[dtype].numpy
    zero = {
        s: Target(np.zeros((rank, s.inputs), numpy), np.zeros((s.outputs, rank), numpy), scale, s.kind, dtype)
        for s in set(filled.values())
    }
    targets = dict[str, Target]()
    for name, shape in filled.items():
        targets[name] = zero[shape]
        if name in adapter.targets:
            target, more = folded(adapter.targets[name], scale), rank - adapter.targets[name].rank
            a, b = np.pad(target.a, ((0, more), (0, 0))), np.pad(target.b, ((0, 0), (0, more)))
            targets[name] = replace(target, a=a, b=b)
    config = plain_config(
        adapter.config,
        r=rank,
        lora_alpha=alpha_for(scale, rank),
        rank_pattern={},
        alpha_pattern={},
        target_modules=suffixes(targets, names),
        bias="none",
    )
    # The base has these weights; servers expect only A and B.
    return replace(adapter, targets=targets, config=config, base_layers={})


def require_fits(name: str, target: Target, shapes: Mapping[str, Shape]) -> None:
    """Raise DataError if the base lacks the module, or has another shape."""
    shape = shapes.get(name)
    if shape is None:
        raise DataError(f"the base model has no module {name} for LoRA; name the base that the adapter was made for")
    if (target.inputs, target.outputs) != (shape.inputs, shape.outputs):
        raise DataError(
            f"{name} is {shape.inputs} → {shape.outputs} in the base model, but {target.inputs} → {target.outputs} in "
            "the adapter; name the base that the adapter was made for"
        )


def served_rank(rank: int) -> int:
    """The smallest rank ≥ `rank` that no server pads: 8 or a multiple of 16.

    TGI pads to these, and then divides alpha by the padded rank in all kinds of layers but the first.

    >>> [served_rank(rank) for rank in (0, 5, 8, 9, 33)]
    [8, 8, 8, 16, 48]
    """
    return 8 if rank <= 8 else -(-rank // 16) * 16


_STACKED = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)}


def partners(name: str) -> list[str]:
    """The modules that SGLang needs to stack this one.

    It joins q, k and v into one matrix, and gate and up; it fills in a missing k or up itself.

    >>> partners("layers.0.mlp.up_proj"), partners("layers.0.mlp.fc1")
    (['layers.0.mlp.gate_proj'], [])
    """
    before, dot, last = name.rpartition(".")
    return [f"{before}{dot}{partner}" for partner in _STACKED.get(last, ())]


def commonest_scale(targets: Collection[Target]) -> float:
    """The most common scale of targets with a rank, the larger one in a tie; 1 if there is none."""
    counted = Counter(target.scale for target in targets if target.rank and target.scale)
    return max(counted, key=lambda scale: (counted[scale], scale), default=1.0)


def folded(target: Target, scale: float) -> Target:
    """The same update at another scale: s·B = s'·(s/s'·B), in float32 if s and s' differ."""
    # α = s·r, divided by r again, may differ from s in the last bit.
    if math.isclose(target.scale, scale, rel_tol=1e-12) or target.rank == 0:
        return replace(target, scale=scale)
    b = rounded(target.b.astype(np.float64) * (target.scale / scale), "F32")
    return replace(target, a=rounded(target.a, "F32"), b=b, scale=scale, dtype="F32")


def suffixes(targets: Collection[str], names: Collection[str]) -> list[str]:
    """The shortest name endings that match all targets and nothing else: target_modules as servers expect them.

    >>> suffixes(["h.0.out.dense", "h.1.out.dense", "h.0.q"], ["h.0.out.dense", "h.1.out.dense", "h.0.q", "pool.dense"])
    ['out.dense', 'q']
    """
    others = [name for name in names if name not in set(targets)]
    chosen = set()
    for target in targets:
        parts = target.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        # The full name comes last: if it is another's ending too, PEFT adds a layer that stays zero.
        free = (end for end in endings if not any(o == end or o.endswith(f".{end}") for o in others))
        chosen.add(next(free, target))
    return sorted(chosen)


def layer_kind(name: str) -> str:
    """A module's name with `*` for its numbers.

    >>> layer_kind("layers.3.mlp.fc1")
    'layers.*.mlp.fc1'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
