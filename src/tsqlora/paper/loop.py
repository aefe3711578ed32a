"""Ranks that follow sensitivity, at constant parameters, in any training loop.

start: ranks from the quality sample ── warm-up ── adjust every Δ steps ── freeze
"""

import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from tsqlora import distributed
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.libs.torch import compile_limits
from tsqlora.paper.budget import Sensitivity, allocate, caps, costs, used
from tsqlora.paper.change import Importance, change_ranks, cut_moments, moments
from tsqlora.paper.moves import (
    RankEvent,
    RankSchedule,
    bounded,
    default_interval,
    moved_towards,
    moves_allowed,
)
from tsqlora.paper.order import StepOrder, take_over
from tsqlora.paper.probe import Probe, probe_pass
from tsqlora.paper.sites import lora_layers
from tsqlora.paper.slots import Slots, finalize, find_slots, has_slots, sync_config
from tsqlora.record import PhaseCost
from tsqlora.tasks import Collate, Task
from tsqlora.training.checkpoints import require_options
from tsqlora.training.nonfinite import gradient_norm


class RankLoop:
    """Moves rank between the layers of a model from `paper.wrap`, at constant parameters, in a custom loop.

        ranks = paper.RankLoop(model, optimizer, total_steps=1000)
        for batch in batches:
            ranks.before_forward()              # before every forward pass, or each step's first
            model(**batch).loss.backward()      # as often as you accumulate
            ranks.before_optimizer_step()       # gradients are complete; clipped, scaled or not
            optimizer.step()
            ranks.after_optimizer_step()
            optimizer.zero_grad()
        model = ranks.finish()                  # a plain PEFT model

    Args:
        model: as it trains: plain, compiled, or in DistributedDataParallel.
        total_steps: optimizer steps of the whole run; a step that a gradient scaler skips counts.
        interval: optimizer steps between adjustments; by default a twentieth of the run, at least 10.
        schedule: the shares of the run without adjustments, and how many slots may move at once.
        min_rank: 0 lets a layer lose its adapter altogether.
        moves: False leaves ranks as they are; `start` sets them all the same.

    With accelerate: `prepare` first, `before_forward` before every forward pass, and the two others
    `if accelerator.sync_gradients`. With a gradient scaler: before or after `unscale_`. For runs that stop and go
    on, `state_dict` and `load_state_dict`. First ranks from a sample of rows: `start`.

    The model's first ranks are the budget: as many parameters at every later step. `events` has
    every decision, `final` the ranks at the end, `seconds` the time for measuring and changing beside the steps' own
    backward. Compiled code runs eagerly in the measured steps, one in `interval`, and is compiled again after ranks
    have changed.

    Raises TsqLoraError that names a missing call, at the latest from optimizer.step(). A run that is too short to
    adjust ranks warns. `finish` and `close` remove the hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        interval: int | None = None,
        *,
        schedule: RankSchedule | None = None,
        min_rank: int = 1,
        seed: int = 0,
        moves: bool = True,
    ) -> None:
        self.model, self.optimizer = distributed.unwrapped(model), optimizer
        self.layers, self.final = find_slots(self.model), dict[str, int]()
        self.moves, self.min_rank, self.seed = moves, min_rank, seed
        self.peft = _peft_model(self.model, self.layers, optimizer, min_rank)
        self.schedule = schedule or RankSchedule()
        self.interval = default_interval(total_steps) if interval is None else interval
        self.steps = self.schedule.steps(total_steps, self.interval) if moves else range(0)
        """The steps after which ranks are adjusted."""
        self.shapes = {name: slots.shape for name, slots in self.layers.items()}
        self.capacity = max(slots.capacity for slots in self.layers.values())
        self.budget = used(self.ranks, self.shapes)
        """Parameters."""
        self.importance = Importance(self.layers)
        self.events: list[RankEvent] = []
        """Every decision."""
        self._target(dict.fromkeys(self.layers, 1.0))  # bad bounds are refused before training
        self.state_of: torch.optim.Optimizer | None = optimizer
        """Whose state moves with the slots; None where ranks only move before the first step."""
        parameters = [parameter for slots in self.layers.values() for parameter, _ in slots.matrices()]
        slots = {id(parameter) for parameter in parameters}
        self._others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in slots]
        self.order = StepOrder(parameters)
        self.started = False
        self.spent = PhaseCost()
        """Seconds for measuring and changing ranks; passes and tokens of the first ranks' rows."""
        self._postponed = False
        """Whether the next step adjusts, since the gradients of one that was due overflowed."""
        self._withheld = False
        """Whether the last step that was due did not adjust, since rows were not scored yet."""
        self._rehearsal = False
        self.notes: list[str] = []
        """Warnings, for the record."""
        if len(self.steps) == 0 and moves:
            self._note(
                f"ranks do not move: no adjustment fits into {total_steps} steps at an interval of {self.interval}"
            )
        self._probe: Probe | None = None
        self._tap, self._held = ExitStack(), ExitStack()
        self._held.enter_context(self.order.watch(optimizer))
        self._held.enter_context(compile_limits(2 + len(self.steps)))
        take_over(self.model, self._tap)
        for held in (self._tap, self._held):
            weakref.finalize(self, held.close)  # also where a step failed and nobody closes, at the latest on exit

    @property
    def seconds(self) -> float:
        """Time for measuring and changing ranks, beside the steps' own backward."""
        return self.spent.seconds

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.order.step

    @property
    def ranks(self) -> dict[str, int]:
        """Each layer's current rank; the last one after `finish`."""
        return self.final or {name: slots.rank for name, slots in self.layers.items()}

    def start(
        self,
        dataset: Any,
        collate: Collate,
        *,
        task: Task | None = None,
        batch_size: int = 32,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Set the first ranks, from sensitivities on these samples; options as in `sensitivity`.

        Between two steps, or before the first; the samples are the quality sample, for the method as published.
        """
        begun = time.perf_counter()
        self._require_running()
        self.order.expect("before_forward")
        probe = probe_pass(
            self.model,
            dataset,
            collate,
            task=task,
            batch_size=batch_size,
            seed=self.seed,
            autocast=autocast,
        )
        self.started = True
        self._change("start", probe)
        self.spent.add(forward=len(dataset), backward=len(dataset))
        if len(self.steps) > 0 and self.step >= self.steps[-1]:
            self._note(
                f"ranks were set at step {self.step} and stay: the last step to adjust them was {self.steps[-1]}; "
                "train longer, or lower freeze"
            )
        self.spent.add(seconds=time.perf_counter() - begun)

    def before_forward(self, *, adjust: bool = True) -> None:
        """Open the step; further calls in the same step do nothing.

        With adjust=False ranks stay as they are in this step.
        """
        if self.order.next == "before_optimizer_step":
            return
        self._require_running()
        self.order.come("before_forward")
        step = self.step + 1
        self._withheld |= not adjust and step in self.steps[-1:]
        due = adjust and (step in self.steps or (self._postponed and step < self.steps.stop))
        # The first step is measured without effect, so that what cannot be measured is refused at once.
        self._rehearsal = not due and step == 1 and len(self.steps) > 0
        if due or self._rehearsal:
            self._probe = Probe(lora_layers(self.model), self.seed + self.step)
            self._tap.enter_context(self._probe.watch(self.model))

    def before_optimizer_step(self) -> None:
        """Read the step's gradients."""
        self.order.come("before_optimizer_step")
        # Once ranks are final, importances have no use.
        final = self.step >= self.steps.stop and (self.started or bool(self.events))
        finite = None if final else self.importance.update(gradient_norm(self._others))
        self._tap.close()
        self._postponed = False
        if self._probe is None:
            return
        # Only a measured step waits for the device. If its gradients are not finite it is skipped, and the next one
        # adjusts the ranks.
        skipped = finite is not None and not finite
        self._postponed = skipped and not self._rehearsal
        if self._rehearsal and not skipped:
            self._probe.sensitivity()
        if self._rehearsal or skipped:
            self._probe = None

    def after_optimizer_step(self) -> None:
        """Close the step, and adjust the ranks if it was measured."""
        self.order.come("after_optimizer_step")
        if self.step == 1 and len(self.steps) > 0:
            # Its state exists from now on: an unsupported optimizer is refused at once.
            for slots in self.layers.values():
                moments(slots.a, self.optimizer)
        if self._probe is not None:
            begun = time.perf_counter()
            probe, self._probe = self._probe, None
            self._change("adjustment", probe)
            self.spent.add(seconds=time.perf_counter() - begun)

    def finish(self, *, finalize_model: bool = True) -> PeftModel:
        """End the run: the PEFT model, plain with `finalize_model`, else with slots for further training.

        A second call returns the same model, plain if `finalize_model`.
        """
        if self.final:
            return self._plain() if finalize_model else self.peft
        if self.order.next == "after_optimizer_step":
            self.order.expect("before_forward")
        self.close()
        if not self.events and self._withheld:
            self._note(
                f"ranks are unchanged: no row was scored until step {self.steps[-1]}, the last that "
                "adjusts them; train longer, or lower freeze"
            )
        elif len(self.steps) > 0 and self.step < self.steps.start:
            self._note(
                f"ranks did not move: training ended at step {self.step}, and the first adjustment was to be at step "
                f"{self.steps.start}"
            )
        sync_config(self.peft)
        self.final, self.order.next = self.ranks, "before_forward"
        return self._plain() if finalize_model else self.peft

    def _plain(self) -> PeftModel:
        """The model without slots; the optimizer's state is cut to the active ones."""
        optimizer = self.state_of
        sharded = any(map(distributed.is_sharded, self.model.parameters()))  # which finalize refuses
        if optimizer is not None and has_slots(self.model) and not sharded:
            for slots in find_slots(self.model).values():
                # Of a layer at rank 0 nothing is left to train.
                for parameter, dim in slots.matrices() if slots.rank else ():
                    cut_moments(parameter, dim, slots.rank, optimizer)
        return finalize(self.peft)

    def close(self) -> None:
        """Remove the hooks on the optimizer and the model; `finish` does it too."""
        try:
            self._tap.close()
        finally:
            self._held.close()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the model's and the optimizer's; `torch.load(weights_only=True)` reads it."""
        self.order.expect("before_forward")
        return {
            "step": self.step,
            "layers": list(self.layers),  # the rows of the importance, in order
            "importance": {name: table.clone() for name, table in self.importance.tables().items()},
            "events": [event.to_dict() for event in self.events],
            "started": self.started,
            "postponed": self._postponed,
            "budget": self.budget,
            "interval": self.interval,
            "seconds": self.seconds,
            "withheld": self._withheld,
            "passes": self.spent.forward,
            "tokens": self.spent.tokens,
            "options": self._options,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; load the model's own state first.

        Raises SettingsError for the state of another run.
        """
        if saved["layers"] != list(self.layers):
            raise SettingsError("the checkpoint is of a run with other layers; resume with the run's own")
        most = saved["importance"]["mean"].shape[1]
        begun = {**saved["options"], "ranks.max": most, "ranks.interval": saved["interval"]}
        require_options(begun, {**self._options, "ranks.max": self.capacity})
        events = [RankEvent.from_dict(event) for event in saved["events"]]
        if events and events[-1].ranks != self.ranks:
            raise SettingsError(
                "the model has other ranks than the checkpoint; load the model's state before the loop's"
            )
        self.importance.restore(saved["importance"])
        self.events, self.budget, self.started = events, saved["budget"], saved["started"]
        self._postponed, self._withheld, self.order.step = saved["postponed"], saved["withheld"], saved["step"]
        passes = saved["passes"]
        self.spent = PhaseCost(saved["seconds"], forward=passes, backward=passes, tokens=saved["tokens"])

    @property
    def _options(self) -> dict[str, Any]:
        """Options that a resumed run must share, by the names of its settings."""
        return {
            "ranks.policy": "tsqlora" if self.moves else "fixed",
            "ranks.interval": self.interval,
            "ranks.moves": self.schedule.first_moves(len(self.layers)),
            "ranks.min": self.min_rank,
            "ranks.gamma": self.schedule.gamma,
            "ranks.warmup": self.schedule.warmup,
            "ranks.freeze": self.schedule.freeze,
            "seed": self.seed,
        }

    def _note(self, what: str) -> None:
        self.notes.append(what)
        warnings.warn(what, stacklevel=3)

    def _require_running(self) -> None:
        if self.final:
            raise TsqLoraError(f"the run was finished at step {self.step}; make another RankLoop to train further")

    def _change(self, reason: str, probe: Probe) -> None:
        """Decide ranks from a measured gradient, alike on all processes, change the model, and record the decision.

        A start sets them to the targets of docs/method.md eq. 7, an adjustment moves them towards these.
        """
        measured, before = probe.sensitivity(), self.ranks
        target = ranks = self._target(measured.values)
        min_age = 0
        if reason == "adjustment":
            ages = self.importance.age.cpu()
            # Skipped steps age no slot: one that was active in every other step is old enough.
            min_age = min(self.interval, int(ages.max()))
            old = {name: int((ages[j, :rank] >= min_age).sum()) for j, (name, rank) in enumerate(before.items())}
            ranks = moved_towards(
                target,
                before,
                droppable=old,
                shapes=self.shapes,
                caps=caps(self.shapes, self.capacity),
                budget=self.budget,
                moves=moves_allowed(self.step, self.steps, first=self.schedule.first_moves(len(self.layers))),
                min_rank=self.min_rank,
            )
        ranks = distributed.from_first(ranks)
        moved = change_ranks(
            self.layers,
            ranks,
            importance=self.importance,
            # Before the first step a slot that points where the gradient does only learns faster than the others.
            sketches=probe.directions() if self.step else {},
            optimizer=self.state_of,
            min_age=min_age,
            seed=self.seed + self.step,
        )
        spent = used(self.ranks, self.shapes)
        assert self.ranks == ranks
        assert spent <= self.budget
        total = sum(measured.values.values()) or 1.0
        shares = {name: value / total for name, value in measured.values.items()}
        event = RankEvent(self.step, reason, ranks, target, shares, moved, spent, self.budget)
        self.events = bounded([*self.events, event])

    def _target(self, values: Mapping[str, float]) -> dict[str, int]:
        return allocate(
            Sensitivity(values, self.shapes),
            mean_rank=self.budget / sum(costs(self.shapes).values()),
            min_rank=self.min_rank,
            max_rank=self.capacity,
            gamma=self.schedule.gamma,
        )


def _peft_model(
    model: nn.Module, layers: Mapping[str, Slots], optimizer: torch.optim.Optimizer, min_rank: int
) -> PeftModel:
    """The model, or the PeftModel that is a part of it, whose ranks can change.

    Refuses layers that the optimizer does not train, and biases that a layer would lose at rank 0.
    """
    models = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(models) != 1:
        raise UnsupportedError(f"the model has {len(models)} PeftModels within it, and ranks change in only one")
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
                "optimizer from the parameters of the model that tsqlora.paper.wrap gives"
            )
    bias = cast(LoraConfig, models[0].peft_config[next(iter(layers.values())).adapter]).bias
    if min_rank == 0 and bias != "none":
        raise UnsupportedError(
            f"LoraConfig(bias='{bias}') trains biases that PEFT saves with a layer's adapter, and a layer at rank 0 "
            "has none; set min_rank to 1, or bias to 'none'"
        )
    return models[0]
