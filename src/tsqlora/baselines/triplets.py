"""AdaLoRA and ElaLoRA: W + s·P Λ Q in PEFT's AdaLoRA layers, whose triplets are masked, or come and go.

A triplet is one rank: a number λ with its column of P and row of Q. AdaLoRA is PEFT's, its allocator called at every
step at the right place: Zhang et al. (2023), arXiv 2303.10512. ElaLoRA is re-implemented: triplets are pruned where
they matter least, and as many grow elsewhere: arXiv 2504.00254.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from tsqlora.adapter.change import moments, new_row, smoothed
from tsqlora.adapter.slots import layers_of
from tsqlora.baselines.setup import Built, Setup, adapt, change_phase, count_trainable, whole_rank
from tsqlora.compat.peft import allocate_triplets, chosen_triplets
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.ranks.moves import default_interval, moves_allowed
from tsqlora.training.optimizer import finite_gradients


def adalora(setup: Setup) -> Built:
    """AdaLoRA from 1.5 times the mean rank down to it, by PEFT's allocator.

    tinit is a tenth of the steps, tfinal three tenths, deltaT a twentieth and at least 10: the phases of
    our own callback. The smoothing (0.85) and the weight of the penalty (0.5) are PEFT's defaults. The
    scale is alpha / mean_rank, as for every method: PEFT divides by the first rank, so lora_alpha is as
    much larger.
    """
    mean = whole_rank(setup.mean_rank, "adalora")
    phase = change_phase(setup.steps, method="adalora")
    model = build(
        setup,
        rank=math.floor(1.5 * mean + 0.5),
        scale=setup.alpha / mean,
        target_r=mean,
        tinit=phase.start,
        tfinal=setup.steps - phase.stop,
        deltaT=default_interval(setup.steps),
    )

    def unmasked_parameters() -> int:
        ranks = _unmasked_ranks(model)
        masked = sum((triplets.rank - ranks[name]) * triplets.cost for name, triplets in triplets_of(model).items())
        return count_trainable(model) - masked

    return Built(
        model,
        (PenaltyInTraining(model, "adalora"), AdaLoraCallback(model)),
        trainable=unmasked_parameters,
        ranks=lambda: _unmasked_ranks(model),
    )


class AdaLoraCallback(TrainerCallback):
    """Call PEFT's `update_and_allocate` after each optimizer step, before its gradients are cleared.

    PEFT's phases are over steps counted from 0, as `global_step` is before the Trainer counts the step. A
    skipped step is left out, and an allocation that was due with it comes with the next one.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.config, self.layers = model, config_of(model), triplets_of(model)
        final = cast(int, self.config.total_step) - self.config.tfinal
        multiples = (step for step in range(self.config.tinit + 1, final) if step % self.config.deltaT == 0)
        self.due = Due([*multiples, final])
        self.allocations: list[int] = []
        """Steps at which the allocator chose triplets."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step, skipped = state.global_step, step_was_skipped(self.model, self.layers)
        due = self.due.taken(step, skipped=skipped)
        if not skipped and allocate_triplets(self.model, self.config, step if due is None else due):
            self.allocations.append(step)


def _unmasked_ranks(model: PeftModel) -> dict[str, int]:
    """Each layer's triplets that the last allocation chose; all before the first."""
    chosen = chosen_triplets(config_of(model))
    return {name: chosen.get(name, triplets.rank) for name, triplets in triplets_of(model).items()}


ORTHOGONALITY = 0.1
"""The weight of the penalty, ElaLoRA's own."""
OFFERED = 2
"""ElaLoRA's k: triplets that each matrix offers."""
MOVES = 4
"""ElaLoRA's b₀: triplets that change places when the phase begins."""


def elalora(setup: Setup) -> Built:
    """ElaLoRA with its reference settings (b = 4, k = 2, β = 0.85, penalty 0.1) and our phases.

    The layers and the penalty, a mean of Frobenius norms, are PEFT's for AdaLoRA, which has both from the
    same code. The optimizer keeps the state of triplets that stay.
    """
    mean = whole_rank(setup.mean_rank, "elalora")
    steps = change_steps(setup.steps)
    model = build(setup, rank=mean, scale=setup.alpha / mean, target_r=mean, orth_reg_weight=ORTHOGONALITY)
    return Built(
        model,
        (PenaltyInTraining(model, "elalora"), ElaLoraCallback(model, setup.steps, steps, seed=setup.seed)),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: triplets.rank for name, triplets in triplets_of(model).items()},
    )


def change_steps(steps: int) -> list[int]:
    """Steps at which ElaLoRA moves ranks: multiples of the interval within the phase, its first step left out.

    Raises SettingsError if there is none.

    >>> change_steps(60)
    [10, 20, 30, 40]
    """
    phase, every = change_phase(steps, method="elalora"), default_interval(steps)
    due = [step for step in phase[1:] if step % every == 0]
    if not due:
        raise SettingsError(
            f"the run has {steps} optimizer steps, and elalora would change no rank: it does so every {every} steps "
            f"before step {phase.stop}; train longer, or leave it out"
        )
    return due


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


class ElaLoraCallback(TrainerCallback):
    """Score the triplets after each optimizer step, and move ranks at the steps of `due`.

    Steps are counted from 0, as `global_step` is before the Trainer counts the step.
    """

    def __init__(self, model: PeftModel, steps: int, due: Sequence[int], *, seed: int) -> None:
        self.model, self.seed = model, seed
        self.layers = triplets_of(model)
        self.importance = Importance(self.layers)
        self.phase, self.due = change_phase(steps, method="elalora"), Due(due)
        self.changes: dict[int, int] = {}
        """Number of triplets that changed places, by step."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step, skipped = state.global_step, step_was_skipped(self.model, self.layers)
        if step < self.phase.stop and not skipped:
            self.importance.update()
        due = self.due.taken(step, skipped=skipped)
        if due is None:
            return
        drops, grows = exchange(self.importance.scores(), moves=moves_allowed(due, self.phase, first=MOVES))
        for name in {**drops, **grows}:
            triplets, grown = self.layers[name], grows.get(name, 0)
            remaining = [j for j in range(triplets.rank) if j not in drops.get(name, [])]
            change(triplets, remaining=remaining, grown=grown, optimizer=kwargs["optimizer"], seed=self.seed + due)
            self.importance.changed(name, remaining=remaining, grown=grown)
        if drops:
            self.changes[step] = sum(grows.values())
            write_ranks(self.model)


ADAPTER = "default"
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""The configs' chances that a training step skips a block."""
SMALLEST = 1e-13
"""The largest λ of a new triplet, as in ElaLoRA's released code."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """The triplets of one layer."""

    name: str
    layer: AdaLoraLayer

    @property
    def q(self) -> nn.Parameter:
        """rank × i"""
        return self.layer.lora_A[ADAPTER]

    @property
    def p(self) -> nn.Parameter:
        """o × rank"""
        return self.layer.lora_B[ADAPTER]

    @property
    def lam(self) -> nn.Parameter:
        """rank × 1"""
        return self.layer.lora_E[ADAPTER]

    @property
    def rank(self) -> int:
        return self.lam.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one triplet."""
        return self.q.shape[1] + self.p.shape[0] + 1

    def matrices(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """Q, P and λ, each with the dimension along which its triplets lie."""
        return (self.q, 0), (self.p, 1), (self.lam, 0)


def build(setup: Setup, *, rank: int, scale: float, **options: Any) -> PeftModel:
    """Add P Λ Q of this rank and scale s to every target, as PEFT's AdaLoRA layers.

    PEFT divides lora_alpha by the first rank, for the whole run. Raises UnsupportedError for a model of a task without
    a class in PEFT: its plain class has no penalty in its forward pass.
    """
    model = adapt(setup, kind=AdaLoraConfig, init_r=rank, lora_alpha=scale * rank, total_step=setup.steps, **options)
    if type(model) is PeftModel:
        raise UnsupportedError(
            f"PEFT has no class for the task of {type(setup.pretrained.model).__name__}, so its orthogonality penalty "
            "would not be in the loss; leave out adalora and elalora"
        )
    return model


def triplets_of(model: PeftModel) -> dict[str, Triplets]:
    """The triplets of every layer, by the layer's name in the base model."""
    return {name: Triplets(name, layer) for name, layer in layers_of(model).items() if isinstance(layer, AdaLoraLayer)}


def config_of(model: PeftModel) -> AdaLoraConfig:
    config = model.peft_config[ADAPTER]
    assert isinstance(config, AdaLoraConfig)
    return config


class PenaltyInTraining(TrainerCallback):
    """Keep PEFT's orthogonality penalty out of every loss but training's, and its weight the same in every step.

    PEFT adds it to the loss of each forward pass that has labels, in evaluation too. It is on from a
    step's first forward pass to the step's end. Where a step's gradient is the sum over several batches, each batch
    has its part of the weight: `fit` sets their number by `set_summed`; without it the gradient is that of their mean.
    """

    def __init__(self, model: PeftModel, method: str) -> None:
        self.config, self.method = config_of(model), method
        self.weight, self.config.orth_reg_weight = self.config.orth_reg_weight, 0.0
        self.summed: Callable[[], int] = lambda: 1

    def set_summed(self, summed: Callable[[], int]) -> None:
        self.summed = summed

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # With label smoothing the Trainer computes the loss itself and ignores PEFT's.
        if args.label_smoothing_factor:
            raise UnsupportedError(
                f"training.label_smoothing_factor is {args.label_smoothing_factor:g}, and with it PEFT's orthogonality "
                f"penalty is not in the loss of {self.method}; set it to 0, or leave out {self.method}"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.orth_reg_weight = self.weight / self.summed()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.orth_reg_weight = 0.0


def step_was_skipped(model: PeftModel, layers: Mapping[str, Triplets]) -> bool:
    """Whether the optimizer skipped its step: no layer has a gradient any more, or one is not finite.

    Layers of blocks that LayerDrop skipped get a gradient of 0, behind the optimizer's step. Raises UnsupportedError
    with the name of a layer that the loss does not reach, where it reaches others.
    """
    missing = [name for name, triplets in layers.items() if triplets.lam.grad is None]
    if missing and len(missing) < len(layers):
        if any(getattr(model.config, name, 0) for name in LAYER_DROPS):
            for name in missing:
                layers[name].lam.grad = torch.zeros_like(layers[name].lam)
            return step_was_skipped(model, layers)
        raise UnsupportedError(
            f"{missing[0]} has no gradient: the loss does not depend on it; leave it out of target_modules"
        )
    return bool(missing) or not finite_gradients(m for t in layers.values() for m, _ in t.matrices())


class Due:
    """Steps after which ranks move; a move that was due with a skipped step comes with the next one."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = frozenset(steps)
        self._owed: int | None = None

    def taken(self, step: int, *, skipped: bool) -> int | None:
        """The step whose move comes now: this one, or a skipped one before it; None if none does."""
        if step in self.steps:
            self._owed = step
        if skipped:
            return None
        taken, self._owed = self._owed, None
        return taken


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
                table[j] = _resized(table[j], dim, remaining, zeros)


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
    q, p, lam = (_resized(matrix, dim, remaining) for matrix, dim in triplets.matrices())
    rows = _orthogonal_rows(q, grown, seed=zlib.crc32(f"{seed}:{triplets.name}:Q".encode()))
    columns = _orthogonal_rows(p.T, grown, seed=zlib.crc32(f"{seed}:{triplets.name}:P".encode())).T
    news = rows, columns, lam.new_full((grown, 1), min([SMALLEST, *lam.abs().flatten().tolist()]))
    for (matrix, dim), state, new in zip(triplets.matrices(), states, news, strict=True):
        for key, moment in state.items():
            mean = _resized(moment.tensor, dim, remaining).mean(dim, keepdim=True).expand_as(new)
            first = {"zero": torch.zeros_like(new), "mean": mean, "weight": new}[moment.beginning]
            optimizer.state[matrix][key] = _resized(moment.tensor, dim, remaining, first)
        matrix.data, matrix.grad = _resized(matrix.data, dim, remaining, new), None
    triplets.layer.r[ADAPTER] = triplets.rank


def _orthogonal_rows(rows: Tensor, count: int, *, seed: int) -> Tensor:
    there = rows.cpu()
    for j in range(count):
        new = nn.functional.normalize(new_row(there, None, seed=seed + j), dim=0)
        there = torch.cat([there, new[None]])
    return there[len(rows) :].to(rows.device)


def _resized(x: Tensor, dim: int, remaining: Sequence[int], *new: Tensor) -> Tensor:
    """The remaining slots of x along `dim`, followed by new ones."""
    index = torch.tensor(remaining, dtype=torch.int64, device=x.device)
    return torch.cat([x.index_select(dim, index), *(part.to(x) for part in new)], dim).contiguous()


def write_ranks(model: PeftModel) -> None:
    """Write the ranks into PEFT's config, so that the saved adapter loads with PEFT alone."""
    config, layers = config_of(model), triplets_of(model)
    largest = max(triplets.rank for triplets in layers.values())
    scale = config.lora_alpha / config.init_r
    config.init_r, config.lora_alpha = largest, scale * largest  # pyright: ignore[reportAttributeAccessIssue]
    config.rank_pattern = {
        f"{name}.lora_E.{ADAPTER}": [j < triplets.rank for j in range(largest)] for name, triplets in layers.items()
    }
