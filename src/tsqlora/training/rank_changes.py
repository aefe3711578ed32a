"""Decide ranks from a measured gradient, change the model, and record the decision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.adapter.change import change_ranks
from tsqlora.adapter.importance import Importance
from tsqlora.adapter.slots import Slots
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.layer_sensitivity import Probe
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import caps, costs, used
from tsqlora.ranks.events import RankEvent, bounded
from tsqlora.ranks.moves import moved_towards, require_policy
from tsqlora.ranks.schedule import RankSchedule, default_interval, moves_allowed


@dataclass(frozen=True, slots=True)
class RankRules:
    """When the ranks of one run move: `steps` adjust them, `moves` slots may move in the first of these."""

    policy: str
    schedule: RankSchedule
    steps: range
    interval: int
    moves: int
    min_rank: int
    seed: int

    @classmethod
    def of(
        cls,
        policy: str,
        schedule: RankSchedule,
        *,
        total_steps: int,
        interval: int | None,
        layers: int,
        min_rank: int,
        seed: int,
    ) -> "RankRules":
        """The rules of a run of `total_steps` steps on a model with this many layers."""
        require_policy(policy)
        every = default_interval(total_steps) if interval is None else interval
        steps = range(0) if policy == "fixed" else schedule.steps(total_steps, every)
        return cls(policy, schedule, steps, every, schedule.first_moves(layers), min_rank, seed)

    def to_dict(self) -> dict[str, Any]:
        """Options that a resumed run must share, by the names of its settings."""
        return {
            "ranks.policy": self.policy,
            "ranks.interval": self.interval,
            "ranks.moves": self.moves,
            "ranks.min": self.min_rank,
            "ranks.gamma": self.schedule.gamma,
            "ranks.warmup": self.schedule.warmup,
            "ranks.freeze": self.schedule.freeze,
            "seed": self.seed,
        }


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def peft_model(
    model: nn.Module, layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer, min_rank: int
) -> PeftModel:
    """The model, or the PeftModel that is a part of it, whose ranks can change.

    Refuses layers that the optimizer does not train, and biases that a layer would lose at rank 0.
    """
    models = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(models) != 1:
        raise UnsupportedError(f"the model has {len(models)} PeftModels within it, and ranks change in one")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for slots in layers.values():
        if not all(parameter.requires_grad for parameter, _ in slots.matrices()):
            raise UnsupportedError(
                f"the adapter of {slots.name} is frozen, so its rank cannot move; unfreeze it, or leave the layer "
                "out of target_modules"
            )
        if any(id(parameter) not in trained for parameter, _ in slots.matrices()):
            raise SettingsError(
                f"the optimizer does not train the adapter of {slots.name}: the model was wrapped later, or parameters "
                "were chosen by the ends of names, which with slots are parametrizations.weight.original; make the "
                "optimizer from the parameters of the model that tsqlora.wrap gives"
            )
    bias = cast(LoraConfig, models[0].peft_config[next(iter(layers.values())).adapter]).bias
    if min_rank == 0 and bias != "none":
        raise UnsupportedError(
            f"LoraConfig(bias='{bias}') trains biases that PEFT saves with a layer's adapter, and a layer at rank 0 "
            "has none; set min_rank to 1, or bias to 'none'"
        )
    return models[0]


class RankChanges:
    """The ranks of a model, at constant parameters: its first ranks are the budget."""

    def __init__(self, layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer | None, rules: RankRules) -> None:
        self.layers, self.optimizer, self.rules = layers, optimizer, rules
        self.shapes = {name: slots.shape for name, slots in layers.items()}
        self.capacity = max(slots.capacity for slots in layers.values())
        self.budget = used(self.ranks, self.shapes)
        self.importance = Importance(layers)
        self.events: list[RankEvent] = []
        self._target(dict.fromkeys(layers, 1.0))  # bad bounds are refused before training

    @property
    def ranks(self) -> dict[str, int]:
        return {name: slots.rank for name, slots in self.layers.items()}

    def start(self, probe: Probe, step: int) -> None:
        """Set the ranks to the targets of docs/method.md eq. 7."""
        measured = probe.sensitivity()
        target = self._target(measured.values)
        ranks = distributed.from_first(target)
        # Before the first step a slot that points where the gradient does only learns faster than the others.
        moved = self._change(ranks, probe.directions() if step else {}, step, min_age=0)
        self._record("start", step, ranks, target, measured, moved)

    def adjust(self, probe: Probe, step: int) -> None:
        """Move the ranks towards the targets."""
        measured = probe.sensitivity()
        target = self._target(measured.values)
        # Skipped steps age no slot: one that was active in every other step is old enough.
        min_age = min(self.rules.interval, int(self.importance.age.max()))
        ranks = self._decide(target, step, min_age=min_age)
        moved = self._change(ranks, probe.directions(), step, min_age=min_age)
        self._record("adjustment", step, ranks, target, measured, moved)

    def _target(self, values: Mapping[str, float]) -> dict[str, int]:
        return allocate(
            Sensitivity(values, self.shapes, "target", 0),
            mean_rank=self.budget / sum(costs(self.shapes).values()),
            min_rank=self.rules.min_rank,
            max_rank=self.capacity,
            gamma=self.rules.schedule.gamma,
        )

    def _decide(self, target: Mapping[str, int], step: int, *, min_age: int) -> dict[str, int]:
        """The ranks after the moves of this step, the first process's on every process."""
        rules, ages = self.rules, self.importance.age.cpu()
        droppable = {
            name: int((ages[j, : slots.rank] >= min_age).sum()) for j, (name, slots) in enumerate(self.layers.items())
        }
        ranks = moved_towards(
            target,
            self.ranks,
            droppable=droppable,
            shapes=self.shapes,
            caps=caps(self.shapes, self.capacity),
            budget=self.budget,
            moves=moves_allowed(step, rules.steps, first=rules.moves),
            min_rank=rules.min_rank,
        )
        return distributed.from_first(ranks)

    def _change(self, ranks: Mapping[str, int], sketches: Mapping[str, Tensor], step: int, *, min_age: int) -> int:
        return change_ranks(
            self.layers,
            ranks,
            importance=self.importance,
            sketches=sketches,
            optimizer=self.optimizer,
            min_age=min_age,
            seed=self.rules.seed + step,
        )

    def _record(
        self,
        reason: str,
        step: int,
        ranks: Mapping[str, int],
        target: Mapping[str, int],
        measured: Sensitivity,
        moved: int,
    ) -> None:
        """Record a decision, with sensitivities as shares of their sum."""
        spent = used(self.ranks, self.shapes)
        assert self.ranks == ranks
        assert spent <= self.budget
        total = sum(measured.values.values()) or 1.0
        shares = {name: value / total for name, value in measured.values.items()}
        self.events = bounded([*self.events, RankEvent(step, reason, ranks, target, shares, moved, spent, self.budget)])
