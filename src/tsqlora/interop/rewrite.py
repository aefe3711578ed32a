"""The same update in another form: without dead slots, truncated, padded to one rank.  Pure; nothing is written."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tsqlora.errors import DataError, UnsupportedError
from tsqlora.interop.files import config_for, plain_config
from tsqlora.interop.lora import Kind, LoraAdapter, Target
from tsqlora.interop.patterns import alpha_for, lora_config
from tsqlora.interop.tensors import PRECISIONS, Array, rounded


@dataclass(frozen=True, slots=True)
class Shape:
    """What a module of the base takes and gives, as LoRA sees it: an embedding takes its tokens."""

    kind: Kind
    inputs: int
    outputs: int


def require_plain(adapter: LoraAdapter, doing: str) -> None:
    """Raises UnsupportedError, naming it, for an adapter that is more than s·BA beside the base's own weights."""
    if found := adapter.variants() or sorted(adapter.further):
        raise UnsupportedError(
            f"the adapter has {found[0]}, which {doing} cannot hold; export it with --format merged, which PEFT makes"
        )


def compact(adapter: LoraAdapter) -> LoraAdapter:
    """Without the slots that are zero and the targets of which nothing is left: PEFT's format at its smallest.

    ΔW is the same, to the bit.  Raises SettingsError if nothing at all is left.
    """
    require_plain(adapter, "a rewritten adapter")
    used = {name: target.used() for name, target in adapter.targets.items()}
    targets = {name: replace(t, a=t.a[used[name]], b=t.b[:, used[name]]) for name, t in adapter.targets.items()}
    return _with_targets(adapter, {name: target for name, target in targets.items() if target.rank})


def spelled_out(adapter: LoraAdapter) -> LoraAdapter:
    """The same adapter with each rank and alpha by the layer's full name, in place of regular expressions."""
    targets = adapter.targets.items()
    named = lora_config({name: t.rank for name, t in targets}, {name: t.scale for name, t in targets})
    del named["target_modules"]
    return replace(adapter, config={**adapter.config, **named, "use_rslora": False})


def truncate(adapter: LoraAdapter, ranks: Mapping[str, int]) -> tuple[LoraAdapter, dict[str, float]]:
    """Each target at its rank in `ranks` at most, and what that costs it: ‖ΔW − ΔW'‖ / ‖ΔW‖ of each that was cut.

    The best there is at that rank (Eckart and Young, 1936), by SVD.  A target at rank 0 is gone.
    """
    require_plain(adapter, "a truncated adapter")
    cut = {name: cut_to(target, ranks[name]) for name, target in adapter.targets.items() if target.rank > ranks[name]}
    targets = {**adapter.targets, **{name: target for name, (target, _) in cut.items()}}
    left = _with_targets(adapter, {name: target for name, target in targets.items() if target.rank})
    return left, {name: error for name, (_, error) in cut.items()}


def ranks_for(
    adapter: LoraAdapter, mean_rank: float, *, curvature: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The ranks with which least of the update is lost at the parameters of a uniform LoRA of `mean_rank`.

    A direction of layer l is worth (s_l·σ)², times the layer's `curvature` where that is known, and costs
    as many parameters as l has inputs and outputs: the dearest by worth per parameter are kept, as long
    as they fit. Greedy, which is within one direction of the best there is. Ties go by name.
    """
    costs = {name: target.inputs + target.outputs for name, target in adapter.targets.items()}
    left = mean_rank * sum(costs.values())
    worth = []
    for name, target in adapter.targets.items():
        _, singular, _ = decompose(target)
        weight = target.scale**2 * (1.0 if curvature is None else curvature[name])
        worth += [(-weight * float(value) ** 2 / costs[name], name) for value in singular if value > 0]
    ranks = dict.fromkeys(adapter.targets, 0)
    for _, name in sorted(worth):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _with_targets(adapter: LoraAdapter, targets: Mapping[str, Target]) -> LoraAdapter:
    changed = replace(adapter, targets=targets)
    return replace(changed, config=config_for(changed))


def cut_to(target: Target, rank: int) -> tuple[Target, float]:
    """One target at a lower rank, and its relative error in the Frobenius norm."""
    left, singular, right = decompose(target)
    total = float(np.square(singular).sum())
    error = (float(np.square(singular[rank:]).sum()) / total) ** 0.5 if total else 0.0
    root = np.sqrt(singular[:rank])
    a = rounded(root[:, None] * right[:rank], target.dtype).reshape(rank, *target.a.shape[1:])
    b = rounded(left[:, :rank] * root, target.dtype).reshape(target.outputs, rank, *target.b.shape[2:])
    return replace(target, a=a, b=b), error


def decompose(target: Target) -> tuple[Array, Array, Array]:
    """SVD of BA, without s: o × r, r singular values falling, r × i, in float64.  Never forms o × i."""
    a, b = target.matrices()
    qa, ra = np.linalg.qr(a.T)
    qb, rb = np.linalg.qr(b)
    left, singular, right = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ left, singular, right @ qa.T


def universal(adapter: LoraAdapter, shapes: Mapping[str, Shape], names: Collection[str]) -> LoraAdapter:
    """One rank, one alpha, no patterns, no rsLoRA: every target of the adapter, in every layer, zero-padded.

    Layers that a server stacks with a target are there too. Where scales differ, the commonest is
    kept and the others are folded into B, in float32. Else ΔW is the same, to the bit.

    Args:
        shapes: of the base's modules, by name: which the adapter could have. `names`: of all of its modules.

    Raises UnsupportedError for what the form cannot hold, DataError for targets that the base lacks.
    """
    require_plain(adapter, "the universal form")
    for name, target in adapter.targets.items():
        if target.kind == "convolution":
            raise UnsupportedError(f"{name} is a convolution, which the universal form cannot hold; export it as peft")
        require_fits(name, target, shapes)
    kinds = {layer_kind(name) for target in adapter.targets for name in (target, *partners(target))}
    wanted = {name: shape for name, shape in shapes.items() if layer_kind(name) in kinds}
    rank = served_rank(adapter.rank)
    scale = commonest_scale(adapter.targets.values())
    dtypes = {target.dtype for target in adapter.targets.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    # One for all layers of a shape: an adapter of one layer may imply a thousand.
    numpy = PRECISIONS[dtype].numpy
    zero = {
        s: Target(np.zeros((rank, s.inputs), numpy), np.zeros((s.outputs, rank), numpy), scale, s.kind, dtype)
        for s in set(wanted.values())
    }
    targets = {
        name: padded(folded(target, scale), rank) if (target := adapter.targets.get(name)) else zero[shape]
        for name, shape in wanted.items()
    }
    config = plain_config(
        adapter.config,
        r=rank,
        lora_alpha=alpha_for(scale, rank),
        rank_pattern={},
        alpha_pattern={},
        target_modules=suffixes(targets, names),
    )
    # The base has these, whose shapes fit; servers expect nothing but A and B.
    return replace(adapter, targets=targets, config=config, base_layers={})


def require_fits(name: str, target: Target, shapes: Mapping[str, Shape]) -> None:
    """Raises DataError where the base has no such module, or one of another shape."""
    shape = shapes.get(name)
    if shape is None:
        raise DataError(f"the base model has no module {name} that takes LoRA; give the base that the adapter is for")
    if (target.inputs, target.outputs) != (shape.inputs, shape.outputs):
        raise DataError(
            f"{name} is {shape.inputs} → {shape.outputs} in the base model, and {target.inputs} → {target.outputs} in "
            "the adapter; give the base that the adapter is for"
        )


def served_rank(rank: int) -> int:
    """The least rank from `rank` on that no server pads: 8 or a multiple of 16.

    TGI pads to these, and then divides alpha by the padded rank in all layer types but the first.

    >>> [served_rank(rank) for rank in (0, 5, 8, 9, 33)]
    [8, 8, 8, 16, 48]
    """
    return 8 if rank <= 8 else -(-rank // 16) * 16


_STACKED = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)}


def partners(name: str) -> list[str]:
    """The modules beside this one without which SGLang cannot stack it.

    It makes one matrix of q, k and v, and of gate and up; a missing k or up it makes up itself.

    >>> partners("layers.0.mlp.up_proj"), partners("layers.0.mlp.fc1")
    (['layers.0.mlp.gate_proj'], [])
    """
    before, dot, last = name.rpartition(".")
    return [f"{before}{dot}{partner}" for partner in _STACKED.get(last, ())]


def commonest_scale(targets: Collection[Target]) -> float:
    """The scale of most targets that have a rank, the larger one where two are as common; 1 where none has."""
    counted = Counter(target.scale for target in targets if target.rank and target.scale)
    return max(counted, key=lambda scale: (counted[scale], scale), default=1.0)


def folded(target: Target, scale: float) -> Target:
    """The same target at another scale: s·B = s'·(s/s'·B), in float32 where s and s' differ."""
    # α = s·r, divided by r again, is s but for its last bit.
    if math.isclose(target.scale, scale, rel_tol=1e-12) or target.rank == 0:
        return replace(target, scale=scale)
    b = rounded(target.b.astype(np.float64) * (target.scale / scale), "F32")
    return replace(target, a=rounded(target.a, "F32"), b=b, scale=scale, dtype="F32")


def padded(target: Target, rank: int) -> Target:
    """The same target with zero rows of A and zero columns of B up to a rank."""
    more = rank - target.rank
    a = np.concatenate([target.a, np.zeros((more, *target.a.shape[1:]), target.a.dtype)])
    b = np.concatenate([target.b, np.zeros((target.outputs, more, *target.b.shape[2:]), target.b.dtype)], axis=1)
    return replace(target, a=a, b=b)


def suffixes(targets: Collection[str], names: Collection[str]) -> list[str]:
    """The shortest endings of names that all targets have and nothing else: target_modules as servers expect them.

    >>> suffixes(["h.0.out.dense", "h.1.out.dense", "h.0.q"], ["h.0.out.dense", "h.1.out.dense", "h.0.q", "pool.dense"])
    ['out.dense', 'q']
    """
    wanted, found = set(targets), set()
    for target in targets:
        parts = target.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [name for name in names if name not in wanted]
        # The whole name last: it may be another's ending, too; then PEFT adds a layer that stays zero.
        free = (end for end in endings if not any(o == end or o.endswith(f".{end}") for o in others))
        found.add(next(free, target))
    return sorted(found)


def layer_kind(name: str) -> str:
    """What a module is called in any layer.

    >>> layer_kind("layers.3.mlp.fc1")
    'layers.*.mlp.fc1'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
