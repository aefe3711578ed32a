"""Trusted rows that come last: when a training asks the pool, and what follows from its answer.  (docs/method.md)"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import nn
from torch.utils.data import Subset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from tsqlora.auditing.draw.epochs import trusted_steps
from tsqlora.auditing.draw.subset import QualitySubset, inputs_of
from tsqlora.auditing.labels.question import LEAST_HELD_OUT, ask
from tsqlora.auditing.scores import Scores
from tsqlora.model.request import LookRequest
from tsqlora.record import question_in_words
from tsqlora.tasks import Task
from tsqlora.training.live_record import EPOCH_ERROR, epoch_of, step_size

PREFETCHED = 2
"""Batches that torch's DataLoader has each worker read ahead, by default."""
LOOK_AGAIN = 1 / 3
"""Share of a run's steps after which all rows are looked at again, at the next epoch's beginning."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps of a run begin something."""

    asks_step: int
    """Behind it comes the question to the pool: the loader has read the rows of some further steps by then."""
    trusted_step: int
    """From it on the answer decides the rows; the run's last one where there are no trusted rows."""
    second_look: int | None
    """The epoch before which all rows are looked at again."""
    step_size: int
    """Rows of a step, of every process."""
    epoch_steps: int
    """Steps of an epoch."""
    skipped: int
    """Steps of its first epoch that a resumed run counts, though it begins the epoch again at its first row."""

    @classmethod
    def of(cls, data: QualitySubset, args: TrainingArguments, state: TrainerState, batches: int) -> "Schedule":
        """Of a run whose epochs have so many batches."""
        a_step, total = step_size(args, state), state.max_steps
        an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        first = total - trusted_steps(total, data.plan.trusted, a_step)
        # accelerate holds one batch, and each worker some more.
        held = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or PREFETCHED)
        ahead = math.ceil(held / args.gradient_accumulation_steps)
        planned = max(first - ahead, math.ceil(first / 2))
        asks = max(planned, state.global_step + 1)
        again = (e for e in range(1, math.ceil(total / an_epoch)) if LOOK_AGAIN * total <= e * an_epoch < planned)
        skipped = state.global_step % an_epoch if args.ignore_data_skip else 0
        return cls(asks, min(max(first, asks + ahead), total), next(again, None), a_step, an_epoch, skipped)


class TrustedLast:
    """The question to the pool in one training; its answer goes into the plan of the draws."""

    def __init__(self, data: QualitySubset, schedule: Schedule) -> None:
        self.data, self.schedule = data, schedule
        self.question: dict[str, Any] | None = None
        """For the record: the answer, or why there is none; None while the question is to come."""
        self._stopped = False

    @property
    def waits(self) -> bool:
        """Whether the question is still to come."""
        return self.question is None and self.data.plan.asks is not None

    @property
    def contradicted(self) -> bool:
        """Whether the pool has contradicted the trusted rows."""
        return self.question is not None and self.question.get("contradicted", False)

    def plan(self, why_not: str | None) -> None:
        """Plan the question, or mix trusted rows in and say why."""
        if why_not is not None:
            self.question = {"why_not": why_not}
        asks = None if why_not is not None else self._rows_before(self.schedule.trusted_step)
        self.data.plan = replace(self.data.plan, asks=asks)

    def hold_out(self, scores: Scores, source: str = "the pool") -> None:
        """Plan the rows that a look holds out; without enough of them trusted rows are mixed in."""
        self.data.plan = plan = self.data.plan.holding_out(scores)
        held = 0 if plan.held_out is None else int(plan.held_out.sum())
        if plan.asks is not None and held < LEAST_HELD_OUT:
            self.plan(f"{source} has {held} rows to hold out, and the question needs {LEAST_HELD_OUT}")

    def resume(self, question: dict[str, Any] | None) -> None:
        """Continue with the answer of the resumed run."""
        self.question = question
        if question is None:
            return
        asks = None
        if "from" in question:
            epoch, place = question["from"]
            asks = epoch * len(self.data) + place
        if "from_step" in question and (self.schedule.skipped or "until_step" in question):
            # Its epochs had other steps than they have in the Trainer now.
            asks = self._rows_before(question["from_step"] - 1)
        self.data.plan = replace(self.data.plan, asks=asks, contradicted=self.contradicted)

    def stops(self, control: TrainerControl) -> None:
        """Note what the training intends before EarlyStoppingCallback has seen an evaluation."""
        self._stopped = control.should_training_stop

    def is_due_early(self, state: TrainerState, control: TrainerControl) -> bool:
        """Whether EarlyStoppingCallback has stopped the pool's steps; then the answer decides the next epoch."""
        at = state.global_step
        evaluated = any(name.startswith("eval_") for log in state.log_history if log["step"] == at for name in log)
        stopped = control.should_training_stop and not self._stopped and evaluated and stops_early(state)
        if not (self.waits and stopped):
            return False
        between = abs((state.epoch or 0) - epoch_of(state)) < EPOCH_ERROR
        self.data.plan = replace(self.data.plan, asks=(epoch_of(state) + (not between)) * len(self.data))
        return True

    def ask(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        task: Task,
        request: LookRequest,
        *,
        early: TrainerControl | None = None,
    ) -> tuple[int, str]:
        """Ask the pool; return the number of rows that were measured, and the answer in words.

        Asked `early`, and contradicted, the epoch ends, and the trusted rows have their steps.
        """
        data = self.data
        assert data.plan.held_out is not None
        held = np.flatnonzero(data.plan.held_out)
        rows, few = cast(Any, data.dataset), cast(Any, data.trusted)
        trusted = Subset(few, np.flatnonzero(~data.suspects).tolist())
        pool = Subset(rows, held[np.unique(inputs_of(Subset(rows, held.tolist())))].tolist())  # one of its copies
        compute = replace(request.compute, workers=0, progress=None)
        answer = ask(model, trusted, pool, request.collate, task, compute)
        first = self.schedule.trusted_step if early is None else state.global_step
        when = {"step": state.global_step, "from_step": first + 1, "from": self._place()}
        self.question = {**when, **answer, "suspects": int(data.suspects.sum())}
        data.answer(contradicted=answer["contradicted"])
        words = question_in_words(self.question)
        if self.contradicted and args.load_best_model_at_end:
            words += "; it keeps its last model, since validation rows that are like the pool would choose another"
        if self.contradicted and stops_early(state):
            words += "; it does not evaluate in these steps, since such rows would stop it"
        if self.contradicted and early is not None:
            self.question["until_step"] = first + state.max_steps - self.schedule.trusted_step
            early.should_training_stop, early.should_epoch_stop = False, True
        return len(trusted) + len(pool), words

    def end_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Stop behind the steps of trusted rows that early stopping has brought forward."""
        if state.global_step >= (self.question or {}).get("until_step", math.inf):
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS  # as the Trainer does at its last step

    def close_validation(self, state: TrainerState, control: TrainerControl | None = None) -> None:
        """Where trusted rows come last, validation rows, which are like the pool, choose neither model nor end."""
        if self.contradicted:
            state.best_model_checkpoint = None
            if control is not None:
                control.should_evaluate &= not stops_early(state)

    def end(self, state: TrainerState) -> str | None:
        """End the plan, which is another one in the next training; a warning if no trusted row was trained on."""
        first = (self.question or {}).get("from_step", self.schedule.trusted_step + 1)
        none = None
        if self.data.plan.asks is not None and state.global_step < first:
            none = f"training ended at step {state.global_step}, and trusted rows come from step {first} on: none was "
            none += "trained on; train longer, or stop later"
            if self.question is None and stops_early(state):
                none += ", or name EarlyStoppingCallback before QualityCallback: then the question comes when it stops"
            self.question = {**(self.question or {"from": self._place()}), "unasked": none}
        self.data.plan = replace(self.data.plan, asks=None)
        return none

    def summary(self) -> dict[str, Any] | None:
        """For the record: the question, or when it comes."""
        if not self.waits:
            return self.question
        return {
            "unasked": f"the question to the pool comes after step {self.schedule.asks_step}",
            "from": self._place(),
        }

    def _rows_before(self, step: int) -> int:
        """Return the rows of the run up to this step, over its epochs."""
        epoch, rest = divmod(step - self.schedule.skipped, self.schedule.epoch_steps)
        return epoch * len(self.data) + rest * self.schedule.step_size

    def _place(self) -> list[int]:
        """Return the epoch, and the place in it, from which the answer decides."""
        return [*divmod(self.data.plan.asks or 0, len(self.data))]


def stops_early(state: TrainerState) -> bool:
    """Whether the Trainer has an EarlyStoppingCallback."""
    return "EarlyStoppingCallback" in (state.stateful_callbacks or ())
