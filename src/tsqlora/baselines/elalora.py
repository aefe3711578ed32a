"""ElaLoRA, re-implemented: triplets are pruned where they matter least, as many grow elsewhere.  arXiv 2504.00254."""

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.baselines.setup import Built, Setup, count_trainable, require_whole_run
from tsqlora.baselines.svd import (
    Due,
    Importance,
    PenaltyInTraining,
    build,
    change,
    says_nothing,
    tell_config,
    triplets_of,
)
from tsqlora.errors import TsqLoraError
from tsqlora.ranks.baselines import MOVES, change_phase, elalora_moves, elalora_steps, whole_rank
from tsqlora.ranks.schedule import moves_allowed

ORTHOGONALITY = 0.1
"""The weight of the penalty, ElaLoRA's own."""


def elalora(setup: Setup) -> Built:
    """ElaLoRA with its reference settings (b = 4, k = 2, β = 0.85, penalty 0.1) and our phases.

    The layers and the penalty, a mean of Frobenius norms, are PEFT's for AdaLoRA, which has both from the
    same code. The optimizer's state of kept triplets stays.
    """
    return _build(setup, "elalora", as_released=False)


def elalora_as_released(setup: Setup) -> Built:
    """ElaLoRA, and what its released code does to the optimizer at each change.

    All of its state is thrown away, and from the first change on the learning rate is constant at its
    peak: the code makes a new optimizer, of which the schedule does not know.
    """
    return _build(setup, "elalora-as-released", as_released=True)


def _build(setup: Setup, name: str, *, as_released: bool) -> Built:
    mean = whole_rank(setup.mean_rank, name)
    elalora_steps(setup.steps)  # a run that is too short is told now
    model = build(setup, rank=mean, scale=setup.alpha / mean, target_r=mean, orth_reg_weight=ORTHOGONALITY)
    return Built(
        model,
        (
            PenaltyInTraining(model, name),
            ElaLoraCallback(model, setup.steps, name=name, as_released=as_released, seed=setup.seed),
        ),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: triplets.rank for name, triplets in triplets_of(model).items()},
    )


class ElaLoraCallback(TrainerCallback):
    """Scores the triplets after each optimizer step, and moves ranks when it is time.

    Steps are counted from 0, as `global_step` is before the Trainer counts the step.
    """

    def __init__(self, model: PeftModel, steps: int, *, name: str, as_released: bool, seed: int) -> None:
        self.model, self.steps, self.name, self.as_released, self.seed = model, steps, name, as_released, seed
        self.layers = triplets_of(model)
        self.importance = Importance(self.layers)
        self.phase, self.due = change_phase(steps, method=name), Due(elalora_steps(steps))
        self.changes: dict[int, int] = {}
        """How many triplets changed places, by step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_whole_run(state, self.steps, self.name)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if self.as_released and self.changes:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, skipped = state.global_step, says_nothing(self.layers)
        if step < self.phase.stop and not skipped:
            self.importance.update()
        due = self.due.taken(step, skipped=skipped)
        if due is not None:
            self._move(step, due, kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.changes:
            raise TsqLoraError(
                f"training ended after {state.global_step} steps, and no rank was ever moved: the first move was to be "
                f"after step {min(self.due.steps) + 1}; train longer, or leave out {self.name}"
            )

    def _move(self, step: int, due: int, optimizer: torch.optim.Optimizer) -> None:
        moves = elalora_moves(self.importance.scores(), moves=moves_allowed(due, self.phase, first=MOVES))
        for name, triplets in self.layers.items():
            gone, grown = moves.drops.get(name, []), moves.grows.get(name, 0)
            if gone or grown:
                kept = [j for j in range(triplets.rank) if j not in gone]
                change(triplets, kept=kept, grown=grown, optimizer=optimizer, seed=self.seed + due)
                self.importance.changed(name, kept=kept, grown=grown)
        if moves.drops:
            self.changes[step] = sum(moves.grows.values())
            tell_config(self.model)
            if self.as_released:
                optimizer.state.clear()
