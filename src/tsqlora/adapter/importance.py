"""Importance of each slot, smoothed over optimizer steps: AdaLoRA's Ī·Ū."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsqlora import distributed
from tsqlora.adapter.slots import Slots
from tsqlora.compat.shapes import Bool, Float, Int
from tsqlora.errors import UnsupportedError

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
