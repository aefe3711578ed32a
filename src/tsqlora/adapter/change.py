"""Carry out a decision about ranks on the model: drop the least important slots, grow new ones."""

import zlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tsqlora.adapter.importance import Importance
from tsqlora.adapter.slots import Slots, drop_slots, grow_slot, second_moment_means
from tsqlora.ranks.events import rank_changes


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
    """Brings every layer to its rank in `ranks`; how many slots were given up.

    All are dropped before any grows, so parameters never exceed what they were before or
    will be after.
    """
    drops, grows = rank_changes({name: slots.rank for name, slots in layers.items()}, ranks)
    for name, count in drops.items():
        which, before = importance.least(name, count, min_age=min_age), layers[name].rank
        drop_slots(layers[name], which, optimizer)
        importance.dropped(name, which, before)
    fallback = second_moment_means(layers, optimizer)
    for name, count in grows.items():
        for _ in range(count):
            slots = layers[name]
            rows = slots.a.detach()[: slots.rank]
            direction = new_row(rows, sketches.get(name), seed=zlib.crc32(f"{seed}:{name}:{slots.rank}".encode()))
            grow_slot(slots, direction, optimizer, fallback=fallback)
    return sum(drops.values())


def new_row(rows: Float[Tensor, "r i"], sketch: Float[Tensor, "k i"] | None, *, seed: int) -> Float[Tensor, " i"]:
    """A row for A that points where the gradient does and the rows already there do not.

    The leading right singular vector of the sketch, after projecting out `rows`, at their
    mean norm; a seeded random direction where nothing is left. METHOD 4.4.
    """
    work = torch.float64
    basis = _row_basis(rows.to(work))
    direction = None if sketch is None else _leading(_project_out(sketch.to(work), basis), sketch.to(work))
    if direction is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, rows.shape[1], generator=generator, dtype=work).to(rows.device)
        left = _project_out(noise, basis)
        direction = (left if float(left.norm()) > 1e-6 else noise)[0]
        direction = direction / direction.norm()
    # Without rows, the norm of PEFT's own initial rows: uniform on ±1/√i.
    norm = rows.to(work).norm(dim=1).mean() if len(rows) else torch.tensor(3**-0.5, dtype=work)
    return (direction * norm).to(rows)


def _row_basis(rows: Float[Tensor, "r i"]) -> Float[Tensor, "k i"]:
    """Orthonormal rows that span the same space; zero and dependent rows add nothing."""
    if len(rows) == 0:
        return rows
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > 1e-10 * values.max().clamp_min(1e-300)]


def _project_out(x: Float[Tensor, "k i"], basis: Float[Tensor, "r i"]) -> Float[Tensor, "k i"]:
    return x - (x @ basis.T) @ basis


def _leading(left: Float[Tensor, "k i"], whole: Float[Tensor, "k i"]) -> Float[Tensor, " i"] | None:
    """The leading right singular vector, or None where what is left is rounding noise."""
    if not float(left.norm()) > 1e-6 * float(whole.norm()):
        return None
    vector = torch.linalg.svd(left, full_matrices=False).Vh[0]
    # Either sign is right; one is chosen, so that every process and run agrees.
    return vector * torch.where(vector[vector.abs().argmax()] < 0, -1.0, 1.0)
