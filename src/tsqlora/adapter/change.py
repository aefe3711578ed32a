"""Carry out a decision about ranks on the model: drop the least important slots, grow new ones."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tsqlora import distributed
from tsqlora.adapter.importance import Importance
from tsqlora.adapter.resize import drop_slots, grow_slot, second_moment_means
from tsqlora.adapter.slots import Slots
from tsqlora.compat.torch import double
from tsqlora.ranks.events import rank_changes

NEGLIGIBLE = 1e-6
"""Relative norm after projection below which a direction is rounding noise."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Slots to drop, by layer, and new rows of A."""

    drops: dict[str, list[int]]
    rows: dict[str, Float[Tensor, "k i"]]


def change_ranks(
    layers: Mapping[str, Slots],
    ranks: Mapping[str, int],
    *,
    importance: Importance,
    sketches: Mapping[str, Float[Tensor, "k i"]],
    optimizer: torch.optim.Optimizer | None,
    min_age: int,
    seed: int,
) -> int:
    """Bring every layer to its rank in `ranks`; returns the number of dropped slots.

    All are dropped before any grows, so parameters never exceed the budget. `importance` changes with them.
    """
    distributed.require_same("ranks", sorted((name, slots.rank, ranks[name]) for name, slots in layers.items()))
    changes = distributed.from_first(
        plan_changes(layers, ranks, importance=importance, sketches=sketches, min_age=min_age, seed=seed)
    )
    for name, which in changes.drops.items():
        importance.dropped(name, which)
        drop_slots(layers[name], which, optimizer)
    from_nothing = any(layers[name].rank == 0 for name in changes.rows)
    fallback = second_moment_means(layers, optimizer) if from_nothing else ({}, {})
    for name, rows in changes.rows.items():
        for row in rows:
            grow_slot(layers[name], row, optimizer, fallback=fallback)
    return sum(len(which) for which in changes.drops.values())


def plan_changes(
    layers: Mapping[str, Slots],
    ranks: Mapping[str, int],
    *,
    importance: Importance,
    sketches: Mapping[str, Float[Tensor, "k i"]],
    min_age: int,
    seed: int,
) -> Changes:
    """The least important slots of layers that lose ranks, and new rows for those that gain."""
    drops, grows = rank_changes({name: slots.rank for name, slots in layers.items()}, ranks)
    rows: dict[str, Tensor] = {}
    for name, count in grows.items():
        old = distributed.full_tensor(layers[name].a.detach())[: layers[name].rank].cpu()
        new = old
        for _ in range(count):
            row_seed = zlib.crc32(f"{seed}:{name}:{len(new)}".encode())
            new = torch.cat([new, new_row(new, sketches.get(name), seed=row_seed)[None]])
        rows[name] = new[len(old) :]
    return Changes({name: importance.least(name, count, min_age=min_age) for name, count in drops.items()}, rows)


def new_row(rows: Float[Tensor, "r i"], sketch: Float[Tensor, "k i"] | None, *, seed: int) -> Float[Tensor, " i"]:
    """A row for A along the gradient, orthogonal to the existing rows.

    The leading right singular vector of the sketch, after projecting out `rows`, at their
    mean norm; a seeded random direction where nothing is left. METHOD 4.4.
    """
    there = double(rows)
    basis = _row_basis(there)
    direction = None if sketch is None else _leading(sketch.to(there), basis)
    if direction is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, rows.shape[1], generator=generator, dtype=there.dtype)
        left = _project_out(noise, basis)
        direction = torch.nn.functional.normalize(left if _is_left(left, noise) else noise)[0]
    # Without rows, or with an Embedding's before it trained, the norm of PEFT's own initial rows: uniform on ±1/√i.
    norm = (float(there.norm(dim=1).mean()) if len(rows) else 0.0) or 3**-0.5
    return (direction * norm).to(rows)


def _row_basis(rows: Float[Tensor, "r i"]) -> Float[Tensor, "k i"]:
    """Orthonormal rows that span the same space; zero and dependent rows add nothing."""
    if len(rows) == 0:
        return rows
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > 1e-10 * values.max()]


def _project_out(x: Float[Tensor, "k i"], basis: Float[Tensor, "r i"]) -> Float[Tensor, "k i"]:
    return x - (x @ basis.T) @ basis


def _is_left(left: Float[Tensor, "k i"], whole: Float[Tensor, "k i"]) -> bool:
    return float(left.norm()) > NEGLIGIBLE * float(whole.norm())


def _leading(sketch: Float[Tensor, "k i"], basis: Float[Tensor, "r i"]) -> Float[Tensor, " i"] | None:
    """Leading right singular vector of the sketch outside the basis; None if nothing is left."""
    left = _project_out(sketch, basis)
    if not _is_left(left, sketch):
        return None
    vector = torch.linalg.svd(left, full_matrices=False).Vh[0]
    # Either sign is right; one is chosen, so that every process and run agrees.
    return vector * torch.where(vector[vector.abs().argmax()] < 0, -1.0, 1.0)
