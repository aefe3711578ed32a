"""Change ranks on the model: drop the least important slots, grow new ones; the optimizer's state moves with them.

Per-element state (Adam moments, momentum) is a table, and a slot's importance is AdaLoRA's Ī·Ū, smoothed over steps.
"""

import re
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.errors import UnsupportedError
from tsqlora.libs.accelerate import inner_optimizer
from tsqlora.libs.bitsandbytes import is_eight_bit, optimizer_name
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.libs.torch import double
from tsqlora.paper.moves import rank_changes
from tsqlora.paper.slots import Slots

Beginning = Literal["zero", "mean", "weight"]

BEGINNINGS: Mapping[str, Beginning] = {
    "exp_avg": "zero",
    "exp_avg_sq": "mean",
    "max_exp_avg_sq": "mean",
    "exp_inf": "mean",
    "momentum_buffer": "zero",
    "square_avg": "mean",
    "grad_avg": "zero",
    "acc_delta": "mean",
    "sum": "mean",
    "ax": "weight",
    "prev": "zero",
    "step_size": "mean",
}
"""First value of a new slot in the state of torch's optimizers: zero, the mean of the active slots, or its weight."""

BITSANDBYTES: Mapping[str, Mapping[str, Beginning]] = {
    "adam": {"state1": "zero", "state2": "mean"},
    "lion": {"state1": "zero"},
    "momentum": {"state1": "zero"},
    "rmsprop": {"state1": "mean"},
    "adagrad": {"state1": "mean"},
}
"""The same for the 32-bit state of bitsandbytes, by its name of the optimizer."""

COUPLED = (
    *("LBFGS", "Muon", "LAMB", "LARS", "LARC", "StableAdamW", "NovoGrad", "AdamP", "SGDP", "Shampoo", "SOAP"),
    *("ZeroRedundancyOptimizer", "CPUOffloadOptimizer"),
)
"""Optimizers whose step is not elementwise, or whose state is elsewhere: words of their classes' names.
Many have the same state as Adam or SGD."""

_SERVED = "use AdamW, Adam or SGD"


@dataclass(frozen=True, slots=True)
class Moment:
    """A tensor of the optimizer's state with one number per number of the weight."""

    tensor: Tensor
    beginning: Beginning

    def read(self) -> Tensor:
        """The full tensor; `write` it after a change."""
        return distributed.full_tensor(self.tensor)

    def write(self, whole: Tensor) -> None:
        distributed.assign(self.tensor, whole)


def moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> dict[str, Moment]:
    """The optimizer's state per number of the parameter; empty before its first step.

    Raises UnsupportedError for an optimizer or a state that is not in the tables.
    """
    if optimizer is None:
        return {}
    inner: Any = inner_optimizer(optimizer)
    kind = type(inner)
    # In letters of any case, as a whole word: FusedLAMB has Lamb, and LambdaAdam has not.
    if any(re.search(f"(?i:{word})(?![a-z])", base.__name__) for word in COUPLED for base in kind.__mro__):
        raise UnsupportedError(
            f"the optimizer {kind.__name__} steps a whole matrix at once, or keeps its moments elsewhere, so slots "
            f"cannot change; {_SERVED}"
        )
    packs = optimizer_name(inner)
    beginnings = BEGINNINGS if packs is None else BITSANDBYTES.get(packs, {})
    state = inner.state.get(parameter, {})
    result: dict[str, Moment] = {}
    for name, value in state.items():
        if packs is not None and is_eight_bit(value):
            raise UnsupportedError(
                f"the optimizer {kind.__name__} keeps moments in 8 bits, in which slots cannot change; {_SERVED}, "
                "or bitsandbytes' in 32 bits (optim_bits=32, paged_adamw_32bit)"
            )
        if value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
            continue  # one number for the whole weight, such as a count of steps
        if name not in beginnings or not _is_plain(value) or value.shape != parameter.shape:
            form = f"shape {tuple(value.shape)}" if _is_plain(value) else f"type {type(value).__name__}"
            raise UnsupportedError(
                f"the optimizer {kind.__name__} keeps '{name}' of {form} for a weight of shape "
                f"{tuple(parameter.shape)}; tsqlora does not know how a rank change moves it: {_SERVED}"
            )
        result[name] = Moment(value, beginnings[name])
    return result


def require_moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Raises UnsupportedError, as `moments`, before the optimizer's first step: a copy of it takes one on a copy.

    State that exists does not count: a checkpoint's may belong to another run. An optimizer whose copy cannot step
    passes; `moments` refuses it after its first step.
    """
    inner: Any = inner_optimizer(optimizer)
    groups = [group for group in inner.param_groups if any(p is parameter for p in group["params"])]
    if not groups:
        return
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.ones_like(parameter)
    copied = object.__new__(type(inner))
    # Not its `step`, which a schedule has replaced by one that counts, nor its hooks.
    vars(copied).update({name: value for name, value in vars(inner).items() if name != "step"})
    copied.state, copied.param_groups = defaultdict(dict), [{**groups[0], "params": [twin]}]
    copied._optimizer_step_pre_hooks, copied._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    with suppress(Exception):
        copied.step()
    moments(twin, copied)


def cut_moments(parameter: nn.Parameter, dim: int, size: int, optimizer: torch.optim.Optimizer) -> None:
    """Cut a parameter's optimizer state to its first `size` along `dim`; drop a state that is not in the tables."""
    state = inner_optimizer(optimizer).state
    try:
        beginnings = moments(parameter, optimizer)
    except UnsupportedError:
        state.pop(parameter, None)
        return
    for name, moment in beginnings.items():
        state[parameter][name] = moment.read().narrow(dim, 0, size).clone(memory_format=torch.contiguous_format)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose entries can be moved one by one, not a packed form."""
    return type(value) in (Tensor, nn.Parameter) or distributed.is_sharded(value)


BETA = 0.85


class Importance:
    """Running importance, its uncertainty, and the age in steps, of every slot of every layer.

    A slot's raw importance at a step is |Σ θ·∇θ| over its row of A and column of B, divided
    by the sum over the model, so that clipping and loss scaling drop out. Each running mean
    is corrected by the slot's own age.
    """

    def __init__(self, layers: Mapping[str, Slots]) -> None:
        self.layers = layers
        self.rows = {name: row for row, name in enumerate(layers)}
        self._pairs = [(slots.a, slots.b) for slots in layers.values()]  # looking them up takes as long as the products
        size = (len(layers), next(iter(layers.values())).capacity)  # of all layers the same
        device = next(iter(layers.values())).a.device
        self.mean = torch.zeros(size, device=device)
        self.spread = torch.zeros(size, device=device)
        self.age = torch.zeros(size, device=device, dtype=torch.int64)
        self._ranks: tuple[int, ...] = ()
        self._active = torch.zeros(size, device=device, dtype=torch.bool)

    @torch.no_grad()
    def update(self, others: Tensor | None = None) -> Bool[Tensor, ""]:
        """Take in the current gradients; False, and nothing changes, if one of them or `others` is not finite.

        `others` is the gradient norm of the parameters without LoRA. Everything stays on the device, so that a step
        does not wait for it.

        Raises UnsupportedError if no slot has a gradient: whatever trains the model hides them.
        """
        rows = [
            None if a.grad is None or b.grad is None else slot_products(a, a.grad, b, b.grad) for a, b in self._pairs
        ]
        if all(products is None for products in rows):
            raise UnsupportedError(
                "no LoRA weight has a gradient before the optimizer's step (frozen, or kept elsewhere as DeepSpeed "
                "does), so ranks cannot follow them; leave out RankCallback"
            )
        zeros = torch.zeros_like(self.mean[0])
        # A device_map spreads layers over devices.
        raw = torch.stack([zeros if products is None else products.to(zeros.device) for products in rows])
        total = raw.sum()
        finite = total.isfinite() if others is None else total.isfinite() & others.to(total.device).isfinite()
        raw = raw / torch.where(total > 0, total, 1)
        ranks = tuple(slots.rank for slots in self.layers.values())
        if ranks != self._ranks:
            places = torch.arange(self.mean.shape[1], device=self.mean.device)
            self._ranks, self._active = ranks, places < torch.tensor(ranks, device=self.mean.device)[:, None]
        self.age += self._active & finite
        # Slots that are not active are zero, and so are their products.
        mean, spread = smoothed(raw, self.mean, self.spread, self._correction())
        self.mean, self.spread = torch.where(finite, mean, self.mean), torch.where(finite, spread, self.spread)
        return finite

    def of(self, name: str) -> Float[Tensor, " r"]:
        """Ī·Ū of a layer's active slots; comparable between layers."""
        row, rank = self.rows[name], self.layers[name].rank
        return (self.mean[row] * self.spread[row] / self._correction()[row].square())[:rank]

    def ages(self, name: str) -> Int[Tensor, " r"]:
        """Optimizer steps since each active slot of a layer was added."""
        return self.age[self.rows[name], : self.layers[name].rank]

    def least(self, name: str, count: int, *, min_age: int) -> list[int]:
        """The layer's `count` least important slots among those of at least `min_age`.

        Before any step no importance is measured, and the smallest ones go.
        """
        slots = self.layers[name]
        if bool(self.ages(name).any()):
            score = self.of(name)
        else:
            a, b = (
                distributed.full_tensor(matrix.detach()).movedim(dim, 0)[: slots.rank].flatten(1).float().norm(dim=1)
                for matrix, dim in slots.matrices()
            )
            score = (a * b).to(self.mean)
        score = score.masked_fill(self.ages(name) < min_age, torch.inf)
        order = torch.argsort(score, stable=True)[:count].tolist()
        assert all(self.ages(name)[j] >= min_age for j in order)
        return order

    def dropped(self, name: str, which: Sequence[int]) -> None:
        """Move the records as `drop_slots` is about to move the slots."""
        row, dropped = self.rows[name], set(which)
        remaining = [j for j in range(self.layers[name].rank) if j not in dropped]
        for table in self.tables().values():
            values = table[row, remaining]
            table[row] = 0
            table[row, : len(remaining)] = values

    def tables(self) -> dict[str, Tensor]:
        """The state to save, layers × capacity each."""
        return {"mean": self.mean, "spread": self.spread, "age": self.age}

    def restore(self, tables: Mapping[str, Tensor]) -> None:
        """Load what `tables` returned for the same layers."""
        for name, table in self.tables().items():
            table.copy_(tables[name])

    def _correction(self) -> Float[Tensor, "layers capacity"]:
        return 1 - BETA ** self.age.clamp_min(1).to(self.mean)


def smoothed(raw: Tensor, mean: Tensor, spread: Tensor, correction: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Ī and Ū after one more step: importance, and its distance from the mean, whose bias `correction` divides out."""
    mean = BETA * mean + (1 - BETA) * raw
    return mean, BETA * spread + (1 - BETA) * (raw - mean / correction).abs()


def slot_products(
    a: Float[Tensor, "r i"], grad_a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], grad_b: Float[Tensor, "o r"]
) -> Float[Tensor, " r"]:
    """|Σ θ·∇θ| of each slot, over its row of A and its column of B."""
    return (distributed.full_tensor((a * grad_a).sum(1)) + distributed.full_tensor((b * grad_b).sum(0))).abs().float()


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
