"""ElaLoRA, re-implemented: triplets are pruned where they matter least, as many grow elsewhere.  arXiv 2504.00254."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerState

from tsqlora.baselines.setup import Built, Setup, change_phase, count_trainable, whole_rank
from tsqlora.baselines.svd import (
    Due,
    Importance,
    PenaltyInTraining,
    build,
    change,
    step_was_skipped,
    triplets_of,
    write_ranks,
)
from tsqlora.errors import SettingsError
from tsqlora.ranks.schedule import default_interval, moves_allowed

NAME = "elalora"
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
    mean = whole_rank(setup.mean_rank, NAME)
    steps = change_steps(setup.steps)
    model = build(setup, rank=mean, scale=setup.alpha / mean, target_r=mean, orth_reg_weight=ORTHOGONALITY)
    return Built(
        model,
        (PenaltyInTraining(model, NAME), ElaLoraCallback(model, setup.steps, steps, seed=setup.seed)),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: triplets.rank for name, triplets in triplets_of(model).items()},
    )


def change_steps(steps: int) -> list[int]:
    """Steps at which ElaLoRA moves ranks: multiples of the interval within the phase, its first step left out.

    Raises SettingsError if there is none.

    >>> change_steps(60)
    [10, 20, 30, 40]
    """
    phase, every = change_phase(steps, method=NAME), default_interval(steps)
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
        self.phase, self.due = change_phase(steps, method=NAME), Due(due)
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
