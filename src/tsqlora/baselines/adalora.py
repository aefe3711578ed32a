"""PEFT's AdaLoRA, its allocator called at every step at the right place.  Zhang et al. (2023), arXiv 2303.10512."""

from typing import Any, cast

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.baselines.setup import Built, Setup, count_trainable, require_whole_run
from tsqlora.baselines.svd import Due, PenaltyInTraining, build, config_of, says_nothing, triplets_of
from tsqlora.compat.peft import allocate_triplets, chosen_triplets
from tsqlora.errors import TsqLoraError
from tsqlora.ranks.baselines import change_phase, first_rank, whole_rank
from tsqlora.ranks.schedule import default_interval

NAME = "adalora"


def adalora(setup: Setup) -> Built:
    """AdaLoRA from 1.5 times the mean rank down to it, by PEFT's allocator.

    tinit is a tenth of the steps, tfinal three tenths, deltaT a twentieth and at least 10: the phases of
    our own callback. The smoothing (0.85) and the weight of the penalty (0.5) are PEFT's defaults. The
    scale is alpha / mean_rank, as for every method: PEFT divides by the first rank, so lora_alpha is as
    much larger.
    """
    mean = whole_rank(setup.mean_rank, NAME)
    phase = change_phase(setup.steps, method=NAME)
    model = build(
        setup,
        rank=first_rank(mean),
        scale=setup.alpha / mean,
        target_r=mean,
        tinit=phase.start,
        tfinal=setup.steps - phase.stop,
        deltaT=default_interval(setup.steps),
    )
    return Built(
        model,
        (PenaltyInTraining(model, NAME), AdaLoraCallback(model)),
        trainable=lambda: used_parameters(model),
        ranks=lambda: kept_triplets(model),
    )


class AdaLoraCallback(TrainerCallback):
    """Calls PEFT's `update_and_allocate` after each optimizer step, while its gradients are there.

    PEFT's phases are over steps counted from 0, as `global_step` is before the Trainer counts the step. A
    skipped step is left out, and an allocation that was due with it comes with the next one.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.config, self.layers = model, config_of(model), triplets_of(model)
        self.steps = cast(int, self.config.total_step)
        self.final = self.steps - self.config.tfinal
        multiples = (step for step in range(self.config.tinit + 1, self.final) if step % self.config.deltaT == 0)
        self.due = Due([*multiples, self.final])
        self.allocations: list[int] = []
        """Steps at which the allocator chose triplets."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_whole_run(state, self.steps, NAME)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, skipped = state.global_step, says_nothing(self.layers)
        due = self.due.taken(step, skipped=skipped)
        if not skipped and allocate_triplets(self.model, self.config, step if due is None else due):
            self.allocations.append(step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if max(self.allocations, default=0) < self.final:
            raise TsqLoraError(
                f"training ended after {state.global_step} steps, and AdaLoRA's ranks are final after step "
                f"{self.final + 1}; train all the steps that it was built for"
            )


def kept_triplets(model: PeftModel) -> dict[str, int]:
    """Each layer's triplets that the last allocation kept, all before the first."""
    ranks = chosen_triplets(config_of(model))
    return {name: int(ranks.get(name, triplets.rank)) for name, triplets in triplets_of(model).items()}


def used_parameters(model: PeftModel) -> int:
    """Trainable parameters without those of triplets that are masked."""
    ranks = kept_triplets(model)
    masked = sum((triplets.rank - ranks[name]) * triplets.cost for name, triplets in triplets_of(model).items())
    return count_trainable(model) - masked
