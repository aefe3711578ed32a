"""Ranks that follow sensitivity, in a stock Trainer.  METHOD section 4.

warm-up ── start: ranks from the quality sample ── adjust every Δ steps ── freeze
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.adapter.change import change_ranks
from tsqlora.adapter.importance import Importance
from tsqlora.adapter.resize import moments
from tsqlora.adapter.slots import finalize, find_slots, sync_config
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.gradients.sites import lora_layers
from tsqlora.probe import Estimator, Probe, get_estimator, probe_pass
from tsqlora.quality.subset import QualitySubset
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import caps, costs, used
from tsqlora.ranks.events import RankEvent
from tsqlora.ranks.policies import Policy, get_policy
from tsqlora.ranks.schedule import adjustment_steps, moves_allowed
from tsqlora.training.checkpoint import RankState, checkpoint_folder


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

    `events` tells every decision, `final` the ranks at the end, `seconds` what measuring and
    changing cost beside the steps' own backward. The maximum rank is what the model was
    wrapped with. All of it is saved in the Trainer's checkpoints, so that runs resume.
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
        self._postponed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _require_visible_backward(args)
        self._stop_watching()  # an attempt that failed may have left it open
        self._probe, self._postponed = None, False
        self.layers = find_slots(kwargs["model"])
        self.shapes = {name: slots.shape for name, slots in self.layers.items()}
        # Whatever the model has now is the budget: as many parameters at every later step.
        self.budget = used(self._ranks(), self.shapes)
        self.events, self.started, self.seconds = [], False, 0.0
        self.importance = Importance(self.layers)
        self.interval_steps = max(10, state.max_steps // 20) if self.interval is None else self.interval
        if state.global_step > 0:
            self._resume(RankState.load(checkpoint_folder(args, state)))
        self.mean_rank = self.budget / sum(costs(self.shapes).values())
        self.capacity = max(slots.capacity for slots in self.layers.values())
        self.steps = self._schedule(state.max_steps)
        self._target(dict.fromkeys(self.layers, 1.0))  # bad bounds are told before training

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        data = kwargs["train_dataloader"].dataset
        if isinstance(data, QualitySubset):
            if data.awaits_scores:
                return  # scoring will set the ranks; until then they stay
            if data.scores is not None and not self.started:
                self._start(args, state, data, **kwargs)
        step = state.global_step + 1
        if step in self.steps or (self._postponed and step < self.steps.stop):
            self._probe = Probe(lora_layers(kwargs["model"]), self.estimator, self.seed + state.global_step)
            self._watching = self._probe.watch(kwargs["model"])
            self._watching.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        finite = self.importance.update()
        self._stop_watching()
        # A step whose gradients overflowed is skipped, and says nothing about ranks either.
        self._postponed = self._probe is not None and not finite
        if self._postponed:
            self._probe = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1 and len(self.steps) > 0:
            # Its state is there from now on: an optimizer that cannot be served is told at once.
            for slots in self.layers.values():
                moments(slots.a, kwargs["optimizer"])
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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        RankState(
            layers=list(self.layers),
            importance=self.importance.tables(),
            events=self.events,
            started=self.started,
            budget=self.budget,
            interval=self.interval_steps,
            seconds=self.seconds,
        ).save(checkpoint_folder(args, state))

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

    def _resume(self, saved: RankState) -> None:
        before = (saved.layers, saved.importance["mean"].shape[1], saved.interval)
        if before != (list(self.layers), self.importance.mean.shape[1], self.interval_steps):
            raise SettingsError(
                "the checkpoint is of a run with other layers, ranks.max or ranks.interval; resume with the settings "
                "that the run was begun with"
            )
        self.importance.restore(saved.importance)
        self.events, self.started = saved.events, saved.started
        self.budget, self.seconds = saved.budget, saved.seconds

    def _schedule(self, total: int) -> range:
        if self.policy is get_policy("fixed"):
            return range(0)
        steps = adjustment_steps(total, interval=self.interval_steps, warmup=self.warmup, freeze=self.freeze)
        if len(steps) == 0:
            raise SettingsError(
                f"no adjustment fits into {total} steps with ranks.interval {self.interval_steps}, ranks.warmup "
                f"{self.warmup:g} and ranks.freeze {self.freeze:g}; lower them, train longer, or use ranks.policy fixed"
            )
        return steps

    def _start(self, args: TrainingArguments, state: TrainerState, data: QualitySubset, **kwargs: Any) -> None:
        """The first ranks, from sensitivities on the quality sample: METHOD section 2."""
        self.started = True
        start = time.perf_counter()
        places = np.random.default_rng([self.seed, 4]).permutation(len(data))[: self.samples]
        probe = probe_pass(
            kwargs["model"],
            # Not `data` itself: it tells what training is handed out.
            Subset(data.dataset, data.indices[np.sort(places)].tolist()),
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
        """Carries out a decision and writes it down, sensitivities as shares of their sum."""
        ranks = distributed.from_first(ranks)
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
        assert self._ranks() == ranks
        assert spent <= self.budget
        total = sum(measured.values.values()) or 1.0
        shares = {name: value / total for name, value in measured.values.items()}
        self.events.append(RankEvent(step, reason, ranks, target, shares, moved, spent, self.budget))

    def _target(self, values: Mapping[str, float]) -> dict[str, int]:
        return allocate(
            Sensitivity(values, self.shapes, "target", 0),
            mean_rank=self.mean_rank,
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


def _require_visible_backward(args: TrainingArguments) -> None:
    """Refuses what would hide a step's backward pass from the probe."""
    if args.torch_compile:
        raise UnsupportedError("training.torch_compile hides the layers from RankCallback; set it to false")
    if args.n_gpu > 1:
        raise UnsupportedError(f"{args.n_gpu} GPUs in one process copy the model at each step; use accelerate launch")
