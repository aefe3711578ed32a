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
    triplets_of,
    write_ranks,
)
from tsqlora.errors import TsqLoraError
from tsqlora.ranks.baselines import MOVES, change_phase, elalora_moves, elalora_steps, whole_rank
from tsqlora.ranks.schedule import moves_allowed

NAME = "elalora"
ORTHOGONALITY = 0.1
"""The weight of the penalty, ElaLoRA's own."""


def elalora(setup: Setup) -> Built:
    """ElaLoRA with its reference settings (b = 4, k = 2, β = 0.85, penalty 0.1) and our phases.

    The layers and the penalty, a mean of Frobenius norms, are PEFT's for AdaLoRA, which has both from the
    same code. The optimizer's state of kept triplets stays.
    """
    mean = whole_rank(setup.mean_rank, NAME)
    elalora_steps(setup.steps)  # raises for a run that is too short
    model = build(setup, rank=mean, scale=setup.alpha / mean, target_r=mean, orth_reg_weight=ORTHOGONALITY)
    return Built(
        model,
        (PenaltyInTraining(model, NAME), ElaLoraCallback(model, setup.steps, seed=setup.seed)),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: triplets.rank for name, triplets in triplets_of(model).items()},
    )


class ElaLoraCallback(TrainerCallback):
    """Scores the triplets after each optimizer step, and moves ranks when it is time.

    Steps are counted from 0, as `global_step` is before the Trainer counts the step.
    """

    def __init__(self, model: PeftModel, steps: int, *, seed: int) -> None:
        self.model, self.steps, self.seed = model, steps, seed
        self.layers = triplets_of(model)
        self.importance = Importance(self.layers)
        self.phase, self.due = change_phase(steps, method=NAME), Due(elalora_steps(steps))
        self.changes: dict[int, int] = {}
        """How many triplets changed places, by step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_whole_run(state, self.steps, NAME)

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
                f"after step {min(self.due.steps) + 1}; train longer, or leave out {NAME}"
            )

    def _move(self, step: int, due: int, optimizer: torch.optim.Optimizer) -> None:
        moves = elalora_moves(self.importance.scores(), moves=moves_allowed(due, self.phase, first=MOVES))
        for name, triplets in self.layers.items():
            gone, grown = moves.drops.get(name, []), moves.grows.get(name, 0)
            if gone or grown:
                remaining = [j for j in range(triplets.rank) if j not in gone]
                change(triplets, remaining=remaining, grown=grown, optimizer=optimizer, seed=self.seed + due)
                self.importance.changed(name, remaining=remaining, grown=grown)
        if moves.drops:
            self.changes[step] = sum(moves.grows.values())
            write_ranks(self.model)
