"""Add up what the phases of a run cost, in a stock Trainer."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from time import perf_counter
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.files import write_json
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.checkpoints import register_part, saving_part
from tsqlora.training.drawing import EPOCH_ERROR
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord

COST_FILE = "tsqlora_cost.json"
PHASES = ("look", "trusted model", "ranks", "training")
"""In the order in which they begin."""


def tokens_of(data: QualitySubset, rows: Iterable[int]) -> int:
    """Tokens of these rows of all that there are; 0 if the lengths are not known."""
    return 0 if data.lengths is None else sum(data.lengths[row] for row in rows)


class CostCallback(TrainerCallback):
    """Adds up what training costs, epoch by epoch.

    It must come after RankCallback, whose first probe is no part of an epoch's training.
    """

    def __init__(
        self,
        data: QualitySubset,
        record: RunRecord,
        quality: QualityCallback | None,
        ranks: RankCallback | None,
    ) -> None:
        self.data, self.record, self.quality, self.ranks = data, record, quality, ranks
        self.started: float | None = None
        self.rank_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = register_part(args, state, "cost")
        if resumed is not None:
            saved = json.loads((resumed / COST_FILE).read_text())
            self.record.cost |= {phase: PhaseCost(**cost) for phase, cost in saved["cost"].items()}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.started is None:
            self.rank_seconds = self._rank_seconds()
            self.started = perf_counter()

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
                write_json(folder / COST_FILE, {"cost": cost})

    def place(self, state: TrainerState) -> tuple[str, int, int]:
        """The phase that a step is of, its steps that are done and its steps in all."""
        return "training", state.global_step, state.max_steps

    def of_all(self) -> dict[str, PhaseCost]:
        """What every phase has cost until now, in their order; passes of the epochs that have ended."""
        if self.started is not None:
            self._add_seconds(self.started)
        found = dict(self.record.cost)
        if self.quality is not None:
            found |= self.quality.spent
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
        self.record.phase("training").add(forward=rows, backward=rows, tokens=tokens)

    def _add_seconds(self, since: float) -> None:
        """The time since then, but for what ranks took of it."""
        now, rank_seconds = perf_counter(), self._rank_seconds()
        self.record.phase("training").add(seconds=now - since - (rank_seconds - self.rank_seconds))
        self.started, self.rank_seconds = now, rank_seconds

    def _rank_seconds(self) -> float:
        return 0.0 if self.ranks is None else self.ranks.seconds
