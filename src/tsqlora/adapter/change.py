"""Change ranks on the model: drop the least important slots, grow new ones; the optimizer's state moves with them."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsqlora import distributed
from tsqlora.adapter.importance import Importance
from tsqlora.adapter.moments import moments
from tsqlora.adapter.slots import Slots
from tsqlora.compat.shapes import Float
from tsqlora.compat.torch import double
from tsqlora.ranks.events import rank_changes

NEGLIGIBLE = 1e-6
"""Relative norm after projection below which a direction is rounding noise."""

Means = Mapping[str, float]
"""The first value of a new slot in each of the optimizer's moments that begins at a mean."""


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
    drops, grows = rank_changes({name: slots.rank for name, slots in layers.items()}, ranks)
    least = {name: importance.least(name, count, min_age=min_age) for name, count in drops.items()}
    new: dict[str, Tensor] = {}
    for name, count in grows.items():
        slots = layers[name]
        rows = distributed.full_tensor(slots.a.detach())[: slots.rank].cpu()
        for _ in range(count):  # each orthogonal to those before it
            row_seed = zlib.crc32(f"{seed}:{name}:{len(rows)}".encode())
            rows = torch.cat([rows, new_row(rows, sketches.get(name), seed=row_seed)[None]])
        new[name] = rows[slots.rank :]
    least, new = distributed.from_first((least, new))
    for name, which in least.items():
        importance.dropped(name, which)
        drop_slots(layers[name], which, optimizer)
    from_nothing = any(layers[name].rank == 0 for name in new)
    fallback = second_moment_means(layers, optimizer) if from_nothing else ({}, {})
    for name, rows in new.items():
        for row in rows:
            grow_slot(layers[name], row, optimizer, fallback=fallback)
    return sum(drops.values())


def drop_slots(slots: Slots, which: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
    """Remove active slots; the others move together, with their optimizer state, bit for bit."""
    dropped = sorted({*which})
    remaining = [j for j in range(slots.rank) if j not in dropped]
    order = torch.tensor([*remaining, *dropped, *range(slots.rank, slots.capacity)])

    def moved(whole: Tensor, dim: int) -> Tensor:
        whole.copy_(whole.index_select(dim, order.to(whole.device)))
        whole.narrow(dim, len(remaining), len(dropped)).zero_()
        return whole

    # All are read before any moves: a refused optimizer has changed nothing.
    states = [moments(parameter, optimizer) for parameter, _ in slots.matrices()]
    with torch.no_grad():
        for (parameter, dim), state in zip(slots.matrices(), states, strict=True):
            for tensor in [parameter] if parameter.grad is None else [parameter, parameter.grad]:
                distributed.assign(tensor, moved(distributed.full_tensor(tensor), dim))
            for moment in state.values():
                moment.write(moved(moment.read(), dim))
    slots.set_rank(len(remaining))


def grow_slot(
    slots: Slots,
    row: Float[Tensor, " i"],
    optimizer: torch.optim.Optimizer | None,
    *,
    fallback: tuple[Means, Means] = ({}, {}),
) -> None:
    """Add one slot that leaves ΔW bit-equal: `row` in A, zeros as B's column.

    First moments start at zero. Second moments start at the mean of the matrix's active slots
    (`fallback`, of A and of B, where none is active): Adam counts steps by tensor, so zeros
    would make the first updates several times the learning rate.
    """
    rank = slots.rank
    states = [moments(parameter, optimizer) for parameter, _ in slots.matrices()]
    with torch.no_grad():
        values = (row, torch.zeros(()))
        for (parameter, dim), state, value, means in zip(slots.matrices(), states, values, fallback, strict=True):
            weight = distributed.full_tensor(parameter)
            weight.select(dim, rank).copy_(value)
            distributed.assign(parameter, weight)
            for name, moment in state.items():
                whole = moment.read()
                mean = whole.narrow(dim, 0, rank).mean(dim) if rank else whole.new_tensor(means.get(name, 0.0))
                first = {"zero": torch.zeros(()), "mean": mean, "weight": value}[moment.beginning]
                whole.select(dim, rank).copy_(first)
                moment.write(whole)
    slots.set_rank(rank + 1)


def second_moment_means(layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer | None) -> tuple[Means, Means]:
    """Mean second moments over all active slots of all A, and of all B: what a layer at rank 0 starts from."""
    parts: tuple[dict[str, list[Tensor]], ...] = ({}, {})
    for slots in layers.values():
        for side, (parameter, dim) in zip(parts, slots.matrices(), strict=True):
            for name, moment in moments(parameter, optimizer).items():
                if slots.rank and moment.beginning == "mean":
                    side.setdefault(name, []).append(moment.read().narrow(dim, 0, slots.rank).flatten().cpu())
    a, b = ({name: float(double(torch.cat(values)).mean()) for name, values in side.items()} for side in parts)
    return a, b


def new_row(rows: Float[Tensor, "r i"], sketch: Float[Tensor, "k i"] | None, *, seed: int) -> Float[Tensor, " i"]:
    """A row for A along the gradient, orthogonal to the existing rows.

    The leading right singular vector of the sketch, after projecting out `rows`, at their
    mean norm; a seeded random direction where nothing is left.
    """
    there = basis = double(rows)
    if len(rows):  # orthonormal rows that span the same space; zero and dependent rows add nothing
        _, values, basis = torch.linalg.svd(there, full_matrices=False)
        basis = basis[values > 1e-10 * values.max()]

    def left_of(x: Tensor) -> Tensor | None:
        left = x - (x @ basis.T) @ basis
        return left if float(left.norm()) > NEGLIGIBLE * float(x.norm()) else None

    left = None if sketch is None else left_of(sketch.to(there))
    if left is not None:
        direction = torch.linalg.svd(left, full_matrices=False).Vh[0]
        # Either sign is right; one is chosen, so that every process and run agrees.
        direction = direction * torch.where(direction[direction.abs().argmax()] < 0, -1.0, 1.0)
    else:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, rows.shape[1], generator=generator, dtype=there.dtype)
        left = left_of(noise)
        direction = torch.nn.functional.normalize(noise if left is None else left)[0]
    # Without rows, or with an Embedding's before it trained, the norm of PEFT's own initial rows: uniform on ±1/√i.
    norm = (float(there.norm(dim=1).mean()) if len(rows) else 0.0) or 3**-0.5
    return (direction * norm).to(rows)
