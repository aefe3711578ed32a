"""AdaLoRA's rule in our own hands: prune only, from 1.5 times the mean rank down to it."""

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
    pruning_steps,
    says_nothing,
    tell_config,
    triplets_of,
)
from tsqlora.errors import TsqLoraError
from tsqlora.ranks.baselines import adalora_budget, best_triplets, change_phase, first_rank, interval, whole_rank

NAME = "prune"
ORTHOGONALITY = 0.5
"""The weight of the penalty: PEFT's default for AdaLoRA."""


def prune(setup: Setup) -> Built:
    """P Λ Q whose globally least important triplets are masked, as AdaLoRA masks them, and in the end dropped.

    Budget, phases, scores and penalty are those of `adalora`, and so are the triplets kept. Other than there,
    those that are not kept are gone once ranks are final, and train no longer.
    """
    mean = whole_rank(setup.mean_rank, NAME)
    phase = change_phase(setup.steps, method=NAME)
    model = build(setup, rank=first_rank(mean), scale=setup.alpha / mean, target_r=mean, orth_reg_weight=ORTHOGONALITY)
    return Built(
        model,
        (PenaltyInTraining(model, NAME), PruneCallback(model, phase, mean=mean, steps=setup.steps)),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: triplets.rank for name, triplets in triplets_of(model).items()},
    )


class PruneCallback(TrainerCallback):
    """Masks the λ of triplets that are not kept, and drops these when ranks are final."""

    def __init__(self, model: PeftModel, phase: range, *, mean: int, steps: int) -> None:
        self.model, self.phase, self.steps = model, phase, steps
        self.due = Due(pruning_steps(phase, every=interval(steps)))
        self.layers = triplets_of(model)
        self.importance = Importance(self.layers)
        self.first, self.target = sum(t.rank for t in self.layers.values()), mean * len(self.layers)
        self.kept: dict[str, list[bool]] = {}
        """Which triplets the last decision kept."""
        self.final = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_whole_run(state, self.steps, NAME)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.final:
            return
        step, skipped = state.global_step, says_nothing(self.layers)
        if step < self.phase.stop and not skipped:
            self.importance.update()
        due = self.due.taken(step, skipped=skipped)
        if due is not None:
            self._mask(adalora_budget(due, phase=self.phase, first=self.first, target=self.target))
        if due == self.phase.stop:
            self._drop(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.final:
            raise TsqLoraError(
                f"training ended after {state.global_step} steps, and its ranks are final after step "
                f"{self.phase.stop + 1}; train all the steps that {NAME} was built for"
            )

    @torch.no_grad()
    def _mask(self, budget: int) -> None:
        self.kept = best_triplets(self.importance.scores(), keep=budget)
        for name, triplets in self.layers.items():
            kept = torch.tensor(self.kept[name], device=triplets.lam.device)
            triplets.lam.masked_fill_(~kept[:, None], 0.0)

    def _drop(self, optimizer: torch.optim.Optimizer) -> None:
        for name, triplets in self.layers.items():
            kept = [j for j, stays in enumerate(self.kept[name]) if stays]
            change(triplets, kept=kept, grown=0, optimizer=optimizer, seed=0)
        tell_config(self.model)
        self.final = True
