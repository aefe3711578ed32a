"""Drop and grow slots; the optimizer's moments move with them."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tsqlora.adapter.slots import Slots
from tsqlora.errors import UnsupportedError

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def drop_slots(slots: Slots, which: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
    """Removes active slots; those kept move together, with their optimizer state, bit for bit."""
    gone = set(which)
    kept = [j for j in range(slots.rank) if j not in gone]
    assert len(kept) == slots.rank - len(which)
    order = torch.tensor(kept + sorted(gone) + list(range(slots.rank, slots.capacity)))
    with torch.no_grad():
        for parameter, dim in slots.matrices():
            grads = [] if parameter.grad is None else [parameter.grad]
            for tensor in [parameter, *grads, *moments(parameter, optimizer).values()]:
                tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
                tensor.narrow(dim, len(kept), len(gone)).zero_()
    slots.set_rank(len(kept))


def grow_slot(
    slots: Slots,
    row: Float[Tensor, " i"],
    optimizer: torch.optim.Optimizer | None,
    *,
    fallback: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Adds one slot that leaves ΔW bit-equal: `row` in A, zeros as B's column.

    First moments start at zero. Second moments start at the mean of the matrix's kept slots
    (`fallback`, of A and of B, where none is active): Adam counts steps by tensor, so zeros
    would make the first updates several times the learning rate.
    """
    rank = slots.rank
    assert rank < slots.capacity
    with torch.no_grad():
        slots.a[rank] = row.to(slots.a)
        slots.b[:, rank] = 0
        for (parameter, dim), empty in zip(slots.matrices(), fallback, strict=True):
            for name, state in moments(parameter, optimizer).items():
                new = state.select(dim, rank)
                if name in SECOND_MOMENTS:
                    new.copy_(state.narrow(dim, 0, rank).mean(dim) if rank else torch.full_like(new, empty))
                else:
                    new.zero_()
    slots.set_rank(rank + 1)


def second_moment_means(layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """Mean second moment over all active slots of all A, and of all B: what a layer at rank 0 starts from."""
    means: list[float] = []
    for side in (0, 1):
        active = [
            state.narrow(dim, 0, slots.rank).flatten()
            for slots in layers.values()
            for parameter, dim in [slots.matrices()[side]]
            for name, state in moments(parameter, optimizer).items()
            if name == "exp_avg_sq" and slots.rank > 0
        ]
        means.append(float(torch.cat(active).mean()) if active else 0.0)
    return means[0], means[1]


def moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The optimizer's tensors that have one number for each of the parameter's.

    Raises UnsupportedError for state whose meaning is not known: it could not be kept right.
    """
    if optimizer is None or parameter not in optimizer.state:
        return {}
    state = {n: v for n, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.dim() > 0}
    for name, value in state.items():
        if name not in (*FIRST_MOMENTS, *SECOND_MOMENTS) or value.shape != parameter.shape:
            raise UnsupportedError(
                f"the optimizer keeps '{name}' of shape {tuple(value.shape)} for a weight of shape "
                f"{tuple(parameter.shape)}: it is not known how a rank change moves it; use AdamW, Adam or SGD"
            )
    return state
