"""Add up what the phases of a run cost, in a stock Trainer."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from time import perf_counter
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.files import write_json
from tsqlora.quality.rows import reference_indices
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.checkpoints import register_part, saving_part
from tsqlora.training.cost import PhaseCost, scoring_passes
from tsqlora.training.drawing import EPOCH_ERROR
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord

COST_FILE = "tsqlora_cost.json"
PHASES = ("warm-up", "scoring", "ranks", "training")
"""In the order in which they begin."""


def tokens_of(data: QualitySubset, rows: Iterable[int]) -> int:
    """Tokens of these rows of all that there are; 0 if the lengths are not known."""
    return 0 if data.lengths is None else sum(data.lengths[row] for row in rows)


def scoring_cost(quality: QualityCallback, *, text: bool) -> PhaseCost:
    """What scoring took, tests of a model still at chance included."""
    data = quality.data
    reference = reference_indices(len(data.dataset), cast(int, quality.rule.reference), quality.rule.seed)
    passes = scoring_passes(quality.terms.values(), text=text)
    failed = len(quality.attempts) * passes.test
    cost = PhaseCost(quality.seconds, forward=failed * len(reference), tokens=failed * tokens_of(data, reference))
    if quality.scorings:
        rows = range(len(data.dataset))
        once = passes.cost(len(rows), len(reference))
        tokens = passes.rows * tokens_of(data, rows) + passes.reference * tokens_of(data, reference)
        cost.add(
            forward=quality.scorings * once.forward,
            backward=quality.scorings * once.backward,
            tokens=quality.scorings * tokens,
        )
    return cost


class CostCallback(TrainerCallback):
    """Adds up what warm-up and training cost, epoch by epoch.

    It must come after RankCallback, whose first probe is no part of an epoch's training.
    """

    def __init__(
        self,
        data: QualitySubset,
        record: RunRecord,
        quality: QualityCallback | None,
        ranks: RankCallback | None,
        *,
        text: bool,
    ) -> None:
        self.data, self.record, self.quality, self.ranks, self.text = data, record, quality, ranks, text
        self.started: float | None = None
        self.rank_seconds = 0.0
        self.warmup_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = register_part(args, state, "cost")
        if resumed is not None:
            saved = json.loads((resumed / COST_FILE).read_text())
            self.record.cost |= {phase: PhaseCost(**cost) for phase, cost in saved["cost"].items()}
            self.warmup_steps = saved["warmup_steps"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.started is None:
            self.rank_seconds = self._rank_seconds()
            self.started = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.data.plan.awaits_scores:
            self.warmup_steps = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_epoch(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A save at an epoch's last step comes before its end, which a run that is resumed from there never sees.
        if abs((state.epoch or 0) - round(state.epoch or 0)) < EPOCH_ERROR:
            self._end_epoch(state)
        elif self.started is not None:
            self._add_seconds(self.started)
        with saving_part(args, state, "cost") as folder:
            if state.is_world_process_zero:
                cost = {phase: asdict(cost) for phase, cost in self.record.cost.items()}
                write_json(folder / COST_FILE, {"cost": cost, "warmup_steps": self.warmup_steps})

    def place(self, state: TrainerState) -> tuple[str, int, int]:
        """The phase that a step is of, its steps that are done and its steps in all."""
        return self._phase(), *self._steps(state)

    def of_all(self) -> dict[str, PhaseCost]:
        """What every phase has cost until now, in their order; passes of the epochs that have ended."""
        if self.started is not None:
            self._add_seconds(self.started)
        found = dict(self.record.cost)
        if self.quality is not None:
            found["scoring"] = scoring_cost(self.quality, text=self.text)
        if self.ranks is not None and self.ranks.started:
            found["ranks"] = self.ranks.cost
        return {phase: found[phase] for phase in PHASES if phase in found}

    def _end_epoch(self, state: TrainerState) -> None:
        if self.started is None:
            return
        self._add_seconds(self.started)
        self.started = None
        # The last epoch ends early where max_steps does not fill it.
        share = ((state.epoch or 0) - EPOCH_ERROR) % 1 + EPOCH_ERROR
        rows = round(share * len(self.data))
        tokens = tokens_of(self.data, self.data.indices[:rows])
        self.record.phase(self._phase()).add(forward=rows, backward=rows, tokens=tokens)

    def _add_seconds(self, since: float) -> None:
        """The time since then, but for what ranks took of it."""
        now, rank_seconds = perf_counter(), self._rank_seconds()
        self.record.phase(self._phase()).add(seconds=now - since - (rank_seconds - self.rank_seconds))
        self.started, self.rank_seconds = now, rank_seconds

    def _phase(self) -> str:
        return "warm-up" if self.data.plan.awaits_scores else "training"

    def _steps(self, state: TrainerState) -> tuple[int, int]:
        """Steps of the phase that are done, and its steps in all; a warm-up may turn out longer."""
        if not self.data.plan.awaits_scores:
            return state.global_step - self.warmup_steps, state.max_steps - self.warmup_steps
        epoch_steps = state.max_steps // state.num_train_epochs
        expected = 0 if self.quality is None else self.quality.warmup_epochs * epoch_steps
        return state.global_step, max(expected, -(-state.global_step // epoch_steps) * epoch_steps)

    def _rank_seconds(self) -> float:
        return 0.0 if self.ranks is None else self.ranks.seconds
