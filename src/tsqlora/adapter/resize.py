"""Drop and grow slots; the optimizer's state moves with them."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.adapter.moments import moments
from tsqlora.adapter.slots import Slots
from tsqlora.compat.torch import double

Means = Mapping[str, float]
"""A number for each of the optimizer's moments, by its name."""


def drop_slots(slots: Slots, which: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
    """Remove active slots; the others move together, with their optimizer state, bit for bit."""
    dropped = set(which)
    remaining = [j for j in range(slots.rank) if j not in dropped]
    assert len(remaining) == slots.rank - len(which)
    order = torch.tensor(remaining + sorted(dropped) + list(range(slots.rank, slots.capacity)))

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
    assert rank < slots.capacity
    states = [moments(parameter, optimizer) for parameter, _ in slots.matrices()]
    with torch.no_grad():
        for (parameter, dim), state, value, means in zip(slots.matrices(), states, (row, 0), fallback, strict=True):
            weight = distributed.full_tensor(parameter)
            _put(weight.select(dim, rank), value)
            distributed.assign(parameter, weight)
            for name, moment in state.items():
                whole = moment.read()
                average = whole.narrow(dim, 0, rank).mean(dim) if rank else means.get(name, 0)
                _put(whole.select(dim, rank), {"zero": 0, "mean": average, "weight": value}[moment.beginning])
                moment.write(whole)
    slots.set_rank(rank + 1)


def second_moment_means(layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer | None) -> tuple[Means, Means]:
    """Mean second moments over all active slots of all A, and of all B: what a layer at rank 0 starts from."""
    active = [slots for slots in layers.values() if slots.rank > 0]
    return (
        _means([(slots.rank, *slots.matrices()[0]) for slots in active], optimizer),
        _means([(slots.rank, *slots.matrices()[1]) for slots in active], optimizer),
    )


def _put(place: Tensor, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        place.copy_(value)
    else:
        place.fill_(value)


def _means(sides: Sequence[tuple[int, nn.Parameter, int]], optimizer: torch.optim.Optimizer | None) -> Means:
    """The mean of each moment that begins at a mean, over matrices of these ranks and slot dimensions."""
    parts: dict[str, list[Tensor]] = {}
    for rank, parameter, dim in sides:
        for name, moment in moments(parameter, optimizer).items():
            if moment.beginning == "mean":
                parts.setdefault(name, []).append(moment.read().narrow(dim, 0, rank).flatten().cpu())
    return {name: float(double(torch.cat(parts)).mean()) for name, parts in parts.items()}
