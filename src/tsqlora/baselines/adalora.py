"""PEFT's AdaLoRA, its allocator called at every step at the right place.  Zhang et al. (2023), arXiv 2303.10512."""

import math
from typing import Any, cast

from peft import PeftModel
from transformers import TrainerCallback, TrainerState

from tsqlora.baselines.setup import Built, Setup, change_phase, count_trainable, whole_rank
from tsqlora.baselines.svd import Due, PenaltyInTraining, build, config_of, step_was_skipped, triplets_of
from tsqlora.compat.peft import allocate_triplets, chosen_triplets
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
        (PenaltyInTraining(model, NAME), AdaLoraCallback(model)),
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
