"""How much each slot matters, smoothed over optimizer steps: AdaLoRA's Ī·Ū.  METHOD 4.1."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tsqlora.adapter.slots import Slots

BETA = 0.85


class Importance:
    """Running importance, its uncertainty, and the age in steps, of every slot of every layer.

    A slot's raw importance at a step is |Σ θ·∇θ| over its row of A and column of B, divided
    by the sum over the model, so that clipping and loss scaling drop out. Each running mean
    is corrected by the slot's own age.
    """

    def __init__(self, layers: Mapping[str, Slots]) -> None:
        self.layers = layers
        first = next(iter(layers.values()))
        size = (len(layers), max(s.capacity for s in layers.values()))
        self.rows = {name: row for row, name in enumerate(layers)}
        self.mean = torch.zeros(size, device=first.a.device)
        self.spread = torch.zeros_like(self.mean)
        self.age = torch.zeros(size, dtype=torch.int64, device=first.a.device)

    def update(self) -> bool:
        """Takes in the gradients there are now; False, and nothing changes, if one is not finite."""
        raw = torch.zeros_like(self.mean)
        active = torch.zeros_like(self.mean, dtype=torch.bool)
        for row, slots in enumerate(self.layers.values()):
            active[row, : slots.rank] = True
            if slots.a.grad is not None and slots.b.grad is not None:
                raw[row, : slots.capacity] = slot_products(slots.a, slots.b)
        total = raw.sum()
        if not torch.isfinite(total):
            return False
        if total > 0:
            raw = raw / total
        self.age += active
        self.mean = torch.where(active, BETA * self.mean + (1 - BETA) * raw, 0)
        surprise = (raw - self.mean / self._correction()).abs()
        self.spread = torch.where(active, BETA * self.spread + (1 - BETA) * surprise, 0)
        return True

    def of(self, name: str) -> Float[Tensor, " r"]:
        """Ī·Ū of a layer's active slots; comparable between layers."""
        row, rank = self.rows[name], self.layers[name].rank
        correction = self._correction()[row]
        return (self.mean[row] * self.spread[row] / correction.square())[:rank]

    def ages(self, name: str) -> Tensor:
        """Optimizer steps that each active slot of a layer has been through."""
        return self.age[self.rows[name], : self.layers[name].rank]

    def least(self, name: str, count: int, *, min_age: int) -> list[int]:
        """The layer's `count` least important slots among those of at least `min_age`."""
        score = self.of(name).masked_fill(self.ages(name) < min_age, torch.inf)
        order = torch.argsort(score, stable=True)[:count].tolist()
        assert all(self.ages(name)[j] >= min_age for j in order)
        return order

    def dropped(self, name: str, which: Sequence[int], before: int) -> None:
        """Moves the records as `drop_slots` moved the slots; `before` is the rank it had."""
        row, gone = self.rows[name], set(which)
        kept = [j for j in range(before) if j not in gone]
        for table in (self.mean, self.spread, self.age):
            values = table[row, kept]
            table[row] = 0
            table[row, : len(kept)] = values

    def _correction(self) -> Tensor:
        return (1 - BETA ** self.age.clamp_min(1).to(self.mean.dtype)).to(self.mean)


def slot_products(a: torch.nn.Parameter, b: torch.nn.Parameter) -> Float[Tensor, " r"]:
    """|Σ θ·∇θ| of each slot, over its row of A (r × i) and its column of B (o × r)."""
    assert a.grad is not None and b.grad is not None
    with torch.no_grad():
        return ((a * a.grad).sum(1) + (b * b.grad).sum(0)).abs().float()
