"""Ranks that follow sensitivity, in a stock Trainer.  METHOD section 4.

warm-up ── start: ranks from the quality sample ── adjust every Δ steps ── freeze
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.adapter.change import change_ranks
from tsqlora.adapter.importance import Importance
from tsqlora.adapter.slots import finalize, find_slots, sync_config
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.gradients.sites import lora_layers
from tsqlora.quality.subset import QualitySubset
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import caps, costs, used
from tsqlora.ranks.events import RankEvent
from tsqlora.ranks.policies import Policy, get_policy
from tsqlora.ranks.schedule import adjustment_steps, moves_allowed
from tsqlora.sensitivity import Estimator, Probe, get_estimator, probe_pass


class RankCallback(TrainerCallback):
    """Moves rank between the layers of a model from `tsqlora.wrap`, at constant parameters.

    With a scored QualitySubset as train_dataset, ranks are first set from sensitivities on
    the quality sample. Every `interval` optimizer steps they then move towards the target
    that the step's own backward gives. At the end the model becomes a plain PEFT model.

    Args:
        interval: optimizer steps between adjustments; a twentieth of the run, at least 10,
            if not given.
        warmup, freeze: shares of the run without adjustments, at its start and its end.
        moves: slots that may move in the first adjustment, falling to 0 as a cubic; a
            quarter of the number of layers if not given.
        min_rank: 0 lets a layer lose its adapter altogether.
        gamma: ranks follow sensitivity to this power; 0 keeps them uniform.
        samples: rows of the quality sample on which the first ranks are measured.
        finalize: leave a plain PEFT model; False keeps the slots for further training.

    `events` tells every decision, `final` the ranks at the end, `seconds` what measuring and changing cost beside the steps'
    own backward. The maximum rank is what the model was wrapped with.
    """

    def __init__(
        self,
        interval: int | None = None,
        *,
        warmup: float = 0.1,
        freeze: float = 0.3,
        moves: int | None = None,
        min_rank: int = 1,
        gamma: float = 1.0,
        policy: str | Policy = "tsqlora",
        estimator: str | Estimator = "sensitivity",
        samples: int = 256,
        seed: int = 0,
        finalize: bool = True,
    ) -> None:
        get_estimator(estimator)
        self.policy = get_policy(policy)
        self.interval, self.warmup, self.freeze, self.moves = interval, warmup, freeze, moves
        self.min_rank, self.gamma, self.estimator = min_rank, gamma, estimator
        self.samples, self.seed, self.finalize = samples, seed, finalize
        self.events: list[RankEvent] = []
        self.final: dict[str, int] = {}
        self.started = False
        self.seconds = 0.0
        self._watching: AbstractContextManager[Any] | None = None
        self._probe: Probe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.layers = find_slots(kwargs["model"])
        self.shapes = {name: slots.shape for name, slots in self.layers.items()}
        ranks = self._ranks()
        # Whatever the model has now is the budget: as many parameters at every later step.
        self.budget = used(ranks, self.shapes)
        self.mean_rank = Fraction(self.budget, sum(costs(self.shapes).values()))
        self.capacity = max(slots.capacity for slots in self.layers.values())
        self.importance = Importance(self.layers)
        self.steps = self._schedule(state.max_steps)
        self._target(dict.fromkeys(self.layers, 1.0))  # bad bounds are told before training

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        data = kwargs["train_dataloader"].dataset
        if not self.started and isinstance(data, QualitySubset) and data.scores is not None:
            self._start(args, state, data, **kwargs)
        if self._waits(data) or state.global_step + 1 not in self.steps:
            return
        self._probe = Probe(lora_layers(kwargs["model"]), self.estimator, self.seed + state.global_step)
        self._watching = self._probe.watch(kwargs["model"])
        self._watching.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.importance.update()
        self._stop_watching()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._probe is None:
            return
        probe, self._probe = self._probe, None
        start = time.perf_counter()
        measured = probe.sensitivity()
        target = self._target(measured.values)
        ranks = self.policy(
            self._ranks(),
            target=target,
            droppable={n: int((self.importance.ages(n) >= self.interval_steps).sum()) for n in self.layers},
            shapes=self.shapes,
            caps=caps(self.shapes, self.capacity),
            budget=self.budget,
            moves=moves_allowed(state.global_step, self.steps, first=self._first_moves()),
            min_rank=self.min_rank,
        )
        self._change("adjustment", state.global_step, probe, measured, target, ranks, kwargs["optimizer"])
        self.seconds += time.perf_counter() - start

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_watching()
        if not self.events and len(self.steps) > 0 and state.global_step > 0:
            raise TsqLoraError(
                f"training ended at step {state.global_step} and no rank was ever adjusted: the first adjustment was "
                f"to be at step {self.steps.start}; train longer, lower interval, or leave out RankCallback"
            )
        model = kwargs["model"]
        assert isinstance(model, PeftModel)
        sync_config(model)
        self.final = self._ranks()
        if self.finalize:
            finalize(model)

    def _schedule(self, total: int) -> range:
        self.interval_steps = max(10, total // 20) if self.interval is None else self.interval
        if self.policy is get_policy("fixed"):
            return range(0)
        steps = adjustment_steps(total, interval=self.interval_steps, warmup=self.warmup, freeze=self.freeze)
        if len(steps) == 0:
            raise SettingsError(
                f"no adjustment fits into {total} steps with ranks.interval {self.interval_steps}, ranks.warmup "
                f"{self.warmup:g} and ranks.freeze {self.freeze:g}; lower them, train longer, or use ranks.policy fixed"
            )
        return steps

    def _waits(self, data: Any) -> bool:
        """While scoring is still to come, ranks stay: it will set them."""
        return isinstance(data, QualitySubset) and data.awaits_scores

    def _start(self, args: TrainingArguments, state: TrainerState, data: QualitySubset, **kwargs: Any) -> None:
        """The first ranks, from sensitivities on the quality sample: METHOD section 2."""
        self.started = True
        start = time.perf_counter()
        rows = np.random.default_rng([self.seed, 4]).permutation(len(data))[: self.samples]
        probe = probe_pass(
            kwargs["model"],
            Subset(data, sorted(rows.tolist())),
            kwargs["train_dataloader"].collate_fn,
            estimator=self.estimator,
            batch_size=args.per_device_train_batch_size,
            seed=self.seed,
            autocast=torch.bfloat16 if args.bf16 else None,
        )
        measured = probe.sensitivity()
        target = self._target(measured.values)
        self._change("start", state.global_step, probe, measured, target, target, kwargs["optimizer"])
        self.seconds += time.perf_counter() - start

    def _change(
        self,
        reason: str,
        step: int,
        probe: Probe,
        measured: Sensitivity,
        target: Mapping[str, int],
        ranks: Mapping[str, int],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Carries out a decision and writes it down."""
        moved = change_ranks(
            self.layers,
            ranks,
            importance=self.importance,
            sketches=probe.directions(),
            optimizer=optimizer,
            min_age=0 if reason == "start" else self.interval_steps,
            seed=self.seed + step,
        )
        spent = used(self._ranks(), self.shapes)
        assert self._ranks() == ranks and spent <= self.budget
        self.events.append(RankEvent(step, reason, ranks, target, measured.values, moved, spent, self.budget))

    def _target(self, values: Mapping[str, float]) -> dict[str, int]:
        return allocate(
            Sensitivity(values, self.shapes, "target", 0),
            mean_rank=self.mean_rank,  # type: ignore[arg-type]  (a Fraction is exact)
            min_rank=self.min_rank,
            max_rank=self.capacity,
            gamma=self.gamma,
        )

    def _ranks(self) -> dict[str, int]:
        return {name: slots.rank for name, slots in self.layers.items()}

    def _first_moves(self) -> int:
        return max(1, len(self.layers) // 4) if self.moves is None else self.moves

    def _stop_watching(self) -> None:
        if self._watching is not None:
            watching, self._watching = self._watching, None
            watching.__exit__(None, None, None)
