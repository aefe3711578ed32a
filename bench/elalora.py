"""ElaLoRA over PEFT's AdaLoRA layers, W + s·P Λ Q: triplets go where they matter least, and as many grow elsewhere.

Re-implemented from arXiv 2504.00254 with its reference settings (b₀ = 4, k = 2, β = 0.85, penalty 0.1). A triplet is
one rank: a number λ with its column of P and row of Q. PEFT's own class adds the orthogonality penalty to the loss.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.paper.change import moments, new_row, smoothed
from tsqlora.paper.moves import default_interval, moves_allowed
from tsqlora.training.lora import layers_of

ADAPTER = "default"
ORTHOGONALITY, OFFERED, MOVES = 0.1, 2, 4
"""The penalty's weight, ElaLoRA's k (triplets that each matrix offers) and b₀ (triplets of the first move)."""
SMALLEST = 1e-13
"""The largest λ of a new triplet, as in ElaLoRA's released code."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """The triplets of one layer."""

    name: str
    layer: AdaLoraLayer

    def matrices(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """Q, P and λ, each with the dimension along which its triplets lie."""
        return (self.layer.lora_A[ADAPTER], 0), (self.layer.lora_B[ADAPTER], 1), (self.layer.lora_E[ADAPTER], 0)

    @property
    def rank(self) -> int:
        return self.layer.lora_E[ADAPTER].shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one triplet."""
        return sum(matrix.numel() for matrix, _ in self.matrices()) // self.rank


def triplets_of(model: PeftModel) -> dict[str, Triplets]:
    """The triplets of every layer, by the layer's name in the base model."""
    return {name: Triplets(name, layer) for name, layer in layers_of(model).items() if isinstance(layer, AdaLoraLayer)}


def require_gradients(layers: Mapping[str, Triplets], step: int) -> None:
    """Raises TsqLoraError where a step was skipped: PEFT's allocator and ElaLoRA need the gradients of every step."""
    if any(matrix.grad is None for triplets in layers.values() for matrix, _ in triplets.matrices()):
        raise TsqLoraError(f"step {step} had no finite gradient in every layer, and ranks follow those of each step")


class Importance:
    """Ī and Ū of every number of every triplet, as AdaLoRA and ElaLoRA smooth them."""

    def __init__(self, layers: Mapping[str, Triplets]) -> None:
        self.layers = layers
        self.mean = {name: [torch.zeros_like(m) for m, _ in t.matrices()] for name, t in layers.items()}
        self.spread = {name: [torch.zeros_like(m) for m, _ in t.matrices()] for name, t in layers.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update with |p·∇p| of the current weights and gradients."""
        for name, triplets in self.layers.items():
            mean, spread = self.mean[name], self.spread[name]
            for j, (matrix, _) in enumerate(triplets.matrices()):
                assert matrix.grad is not None
                mean[j], spread[j] = smoothed((matrix * matrix.grad).abs(), mean[j], spread[j])

    def scores(self) -> dict[str, list[float]]:
        """Ī·Ū of each triplet's λ, plus the means over its two vectors."""
        scores: dict[str, list[float]] = {}
        for name in self.layers:
            q, p, lam = (m * s for m, s in zip(self.mean[name], self.spread[name], strict=True))
            scores[name] = (lam.flatten() + (q.mean(1) + p.mean(0))).tolist()
        return scores

    def changed(self, name: str, *, remaining: Sequence[int], grown: int) -> None:
        """Move the records as `change` moves the triplets; new ones begin at zero."""
        for table in (self.mean[name], self.spread[name]):
            for j, (_, dim) in enumerate(self.layers[name].matrices()):
                zeros = torch.zeros_like(table[j].narrow(dim, 0, 1)).repeat_interleave(grown, dim)
                table[j] = resized(table[j], dim, remaining, zeros)


def exchange(
    scores: Mapping[str, Sequence[float]], *, moves: int, offered: int = OFFERED
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """(drops, grows): the triplets that each layer loses, and the number that it gains.

    Each layer offers its `offered` lowest triplets to a pool, and keeps at least one. The lowest `moves` of the pool
    go; the highest of the same pool name the layers that gain. A layer at rank 1 offers nothing, so it neither loses
    nor gains again, as in the released code. The total rank stays. Ties go to the layer, then the triplet, that stands
    first.

    >>> exchange({"query": [0.1, 0.2, 9.0], "key": [0.5, 0.6, 0.7]}, moves=1)
    ({'query': [0]}, {'key': 1})
    """
    pool: list[tuple[float, str, int]] = []
    for layer, values in scores.items():
        lowest = sorted(range(len(values)), key=values.__getitem__)
        pool += [(values[j], layer, j) for j in lowest[: min(offered, len(values) - 1)]]
    pool.sort(key=lambda triplet: triplet[0])
    drops: dict[str, list[int]] = {}
    grows: dict[str, int] = {}
    for _, layer, j in pool[:moves]:
        drops.setdefault(layer, []).append(j)
    for _, layer, _ in pool[max(0, len(pool) - moves) :]:
        grows[layer] = grows.get(layer, 0) + 1
    return drops, grows


class ElaLora(TrainerCallback):
    """Score the triplets after each optimizer step, and move ranks at multiples of the interval within the phase.

    Steps are counted from 0, as `global_step` is before the Trainer counts the step. Raises SettingsError where no
    multiple lies behind the phase's first step.
    """

    def __init__(self, model: PeftModel, phase: range, steps: int, *, seed: int) -> None:
        self.model, self.phase, self.seed = model, phase, seed
        self.layers = triplets_of(model)
        self.importance = Importance(self.layers)
        self.due = [step for step in phase[1:] if step % default_interval(steps) == 0]
        if not self.due:
            raise SettingsError(f"the run has {steps} optimizer steps, and elalora would change no rank; train longer")

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step >= self.phase.stop:
            return
        require_gradients(self.layers, step)
        self.importance.update()
        if step not in self.due:
            return
        drops, grows = exchange(self.importance.scores(), moves=moves_allowed(step, self.phase, first=MOVES))
        for name in {**drops, **grows}:
            triplets, grown = self.layers[name], grows.get(name, 0)
            remaining = [j for j in range(triplets.rank) if j not in drops.get(name, [])]
            change(triplets, remaining=remaining, grown=grown, optimizer=kwargs["optimizer"], seed=self.seed + step)
            self.importance.changed(name, remaining=remaining, grown=grown)
        write_ranks(self.model)


@torch.no_grad()
def change(
    triplets: Triplets, *, remaining: Sequence[int], grown: int, optimizer: torch.optim.Optimizer, seed: int
) -> None:
    """Keep these triplets of a layer, followed by new ones; the optimizer's state moves with them.

    Remaining triplets keep weights and moments bit for bit. A new one has unit vectors in random directions
    at right angles to those there, and a λ too small to change what the layer computes; its first moments
    are zero, its second ones the mean of the remaining ones, since Adam's step count is the whole tensor's.
    """
    states = [moments(matrix, optimizer) for matrix, _ in triplets.matrices()]
    q, p, lam = (resized(matrix, dim, remaining) for matrix, dim in triplets.matrices())
    rows = _orthogonal_rows(q, grown, seed=zlib.crc32(f"{seed}:{triplets.name}:Q".encode()))
    columns = _orthogonal_rows(p.T, grown, seed=zlib.crc32(f"{seed}:{triplets.name}:P".encode())).T
    news = rows, columns, lam.new_full((grown, 1), min([SMALLEST, *lam.abs().flatten().tolist()]))
    for (matrix, dim), state, new in zip(triplets.matrices(), states, news, strict=True):
        for key, moment in state.items():
            mean = resized(moment.tensor, dim, remaining).mean(dim, keepdim=True).expand_as(new)
            first = {"zero": torch.zeros_like(new), "mean": mean, "weight": new}[moment.beginning]
            optimizer.state[matrix][key] = resized(moment.tensor, dim, remaining, first)
        matrix.data, matrix.grad = resized(matrix.data, dim, remaining, new), None
    triplets.layer.r[ADAPTER] = triplets.rank


def _orthogonal_rows(rows: Tensor, count: int, *, seed: int) -> Tensor:
    there = rows.cpu()
    for j in range(count):
        new = nn.functional.normalize(new_row(there, None, seed=seed + j), dim=0)
        there = torch.cat([there, new[None]])
    return there[len(rows) :].to(rows.device)


def resized(x: Tensor, dim: int, remaining: Sequence[int], *new: Tensor) -> Tensor:
    """The remaining slots of x along `dim`, followed by new ones."""
    index = torch.tensor(remaining, dtype=torch.int64, device=x.device)
    return torch.cat([x.index_select(dim, index), *(part.to(x) for part in new)], dim).contiguous()


def write_ranks(model: PeftModel) -> None:
    """Write the ranks into PEFT's config, so that the saved adapter loads with PEFT alone."""
    config, layers = model.peft_config[ADAPTER], triplets_of(model)
    assert isinstance(config, AdaLoraConfig)
    largest = max(triplets.rank for triplets in layers.values())
    scale = config.lora_alpha / config.init_r
    config.init_r, config.lora_alpha = largest, scale * largest  # pyright: ignore[reportAttributeAccessIssue]
    config.rank_pattern = {
        f"{name}.lora_E.{ADAPTER}": [j < triplets.rank for j in range(largest)] for name, triplets in layers.items()
    }
