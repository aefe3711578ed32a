"""Quality sampling in a stock Trainer: warm-up, scoring between two epochs, then quality draws."""

import math
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.errors import DataError, NotLearnedError, SettingsError, TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.progress import Progress
from tsqlora.quality.fallback import guarded
from tsqlora.quality.rule import RowNames, ScoringRule
from tsqlora.quality.scorable import require_scorable
from tsqlora.quality.score import Compute, score
from tsqlora.quality.scores import Scores
from tsqlora.quality.subset import QualitySubset
from tsqlora.quality.terms import Term
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, task_of
from tsqlora.training.callback_state import QualityState, require_options
from tsqlora.training.checkpoints import digest, register_part, saving_part
from tsqlora.training.drawing import (
    EPOCH_ERROR,
    epoch_of,
    leave,
    refuse_cut_epoch,
    refuse_evaluation,
    require_drawn_anew,
    require_subset,
)

SCORES_FILE = "scores.parquet"


WARMUP_LIMIT = 0.5
"""Share of a run's epochs after which a model that is still at chance is not waited for."""


class QualityCallback(TrainerCallback):
    """Scores the rows of a QualitySubset once the model has learned something, then draws by them.

    Warm-up epochs are the first part of the run: random draws, `warmup` passes over all rows.
    Before the next epoch the model is tested against chance; while it is not better, random
    draws go on, up to half of the run's epochs. If it still is not, `refused` says why,
    a warning is given, and the run goes on with random draws.

    Args:
        data: the Trainer's train_dataset.
        warmup: passes over all rows before scoring.
        rule: what is measured, and how rows are drawn by it; its reference is a number of rows.
        task: needed only where training has a loss of its own (class weights, a custom one).
        rows: ids and hashes of the rows, and what else the scores' record should say.
        progress: called with (phase, rows done, rows in all) while rows are scored.
        scores_path: where scores are written; by default scores.parquet in the output_dir.
        collate: makes the batches that are scored; by default the Trainer's own, of which each row is a sample.

    Scores are computed in training's precision, unless `loss_reduction` is measured: that
    is a small difference, and needs float32.

    Raises SettingsError for options that mean nothing together, at once; before the first step SettingsError or
    UnsupportedError naming what of the training cannot be scored or drawn; at its end TsqLoraError where no row was
    ever scored.
    """

    def __init__(
        self,
        data: QualitySubset,
        warmup: float = 1.0,
        *,
        rule: ScoringRule | None = None,
        task: Task | None = None,
        rows: RowNames | None = None,
        scores_path: str | Path | None = None,
        progress: Progress | None = None,
        collate: Collate | None = None,
    ) -> None:
        require_subset(data, "QualityCallback")
        if not warmup > 0:
            raise SettingsError(f"warmup is {warmup}; it must be above 0 passes: a model at chance scores at random")
        self.data, self.warmup = data, warmup
        self.rule = (rule or ScoringRule()).guarded()
        self.rule.require_room(data.plan.fraction)
        if not isinstance(self.rule.reference, int):
            raise SettingsError(
                "QualityCallback chooses its reference rows; give ScoringRule(reference=...) their number"
            )
        self.task, self.rows = task, rows or RowNames()
        self.scores_path = None if scores_path is None else Path(scores_path)
        self.progress, self.collate = progress, collate
        self.refused: str | None = None
        self.attempts: list[str] = []
        self.scorings = 0
        """How often all rows were scored."""
        self.seconds = 0.0
        self._digest: str | None = None

    @property
    def terms(self) -> dict[str, Term]:
        """What a scoring measures."""
        return self.rule.measured()

    @property
    def warmup_epochs(self) -> int:
        """Epochs of the subset that `warmup` passes over all rows take."""
        return math.ceil(self.warmup * len(self.data.dataset) / len(self.data) - 1e-9)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        distributed.refuse_copies(args.n_gpu)
        distributed.refuse_deepspeed(args.deepspeed_plugin)
        if kwargs["train_dataloader"].dataset is not self.data:
            raise SettingsError("QualityCallback(data) and Trainer(train_dataset=data) need the same QualitySubset")
        require_drawn_anew(args, kwargs["train_dataloader"])
        epochs = args.num_train_epochs if args.max_steps <= 0 else state.num_train_epochs
        if self.warmup_epochs >= epochs:
            raise SettingsError(
                f"a warm-up of {self.warmup:g} passes is {self.warmup_epochs} epochs of {len(self.data)} rows, and "
                f"the run has {epochs:g}: no scored epoch would be left; lower quality.warmup or raise training.epochs"
            )
        resumed = register_part(args, state, "quality")
        saved = None if resumed is None else QualityState.load(resumed)
        if saved is None or _awaits(saved):
            self._require_scorable(args, kwargs["model"], self.collate or kwargs["train_dataloader"].collate_fn)
        self.data.plan = self.data.plan.unscored(awaits_scores=True, by="QualityCallback")
        self.data.task, self._digest = self.task, None
        self.attempts, self.refused, self.scorings, self.seconds = [], None, 0, 0.0
        if saved is not None:
            self._resume(saved, self._path(args))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = epoch_of(state)
        # A run resumed in the middle of an epoch begins it again, with weights that are further on.
        at_start = abs((state.epoch or 0) - epoch) < EPOCH_ERROR
        if at_start and self._due(state):
            start = time.perf_counter()
            self._try_scoring(args, state, kwargs["model"], self.collate or kwargs["train_dataloader"].collate_fn)
            self.seconds += time.perf_counter() - start
        self.data.begin_epoch(epoch, "QualityCallback")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_cut_epoch(self.data, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_evaluation(self.data, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        scored = None if self.data.scores is None else self.data.plan.scored_epoch
        saved = QualityState(
            scored, self._digest, self.attempts, self.refused, self.seconds, self.scorings, self._draws()
        )
        with saving_part(args, state, "quality") as folder:
            saved.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        leave(self.data, "QualityCallback")
        if self.data.plan.awaits_scores:
            early = state.global_step < state.max_steps
            how = f"was stopped at step {state.global_step} of {state.max_steps}" if early else "ended"
            raise TsqLoraError(
                f"training {how} at epoch {state.epoch or 0:g}, before the scoring that was to come after "
                f"{self.warmup_epochs} epochs; train longer, or leave out QualityCallback"
            )

    def _due(self, state: TrainerState) -> bool:
        """Whether rows are scored before the epoch that begins."""
        return self.data.plan.awaits_scores and epoch_of(state) >= self.warmup_epochs

    def _draws(self) -> dict[str, Any]:
        data, plan = self.data, self.data.plan
        about = {"rows": plan.rows, "fraction": plan.fraction, "seed": plan.seed, "resample": plan.resample}
        rule = {f.name: getattr(self.rule, f.name) for f in fields(self.rule) if f.name not in ("terms", "seed")}
        rule["weights"] = None if self.rule.weights is None else dict(self.rule.weights)
        decides = {"warmup": self.warmup, "limit": WARMUP_LIMIT, "terms": list(self.terms), **rule}
        return {**about, "batch_size": data.batch_size, **decides, "seed to score": self.rule.seed}

    def _resume(self, saved: QualityState, scores_path: Path) -> None:
        require_options(saved.draws, self._draws())
        self.attempts, self.refused, self.seconds = saved.attempts, saved.refused, saved.seconds
        self._digest, self.scorings = saved.scores_sha256, saved.scorings
        if saved.scored_epoch is not None:
            distributed.once(lambda: _require_same_scores(scores_path, saved.scores_sha256))
            self._use(Scores.load(scores_path), saved.scored_epoch)
        elif saved.refused is not None:
            self._give_up()

    def _require_scorable(self, args: TrainingArguments, model: nn.Module, collate: Any) -> None:
        """Before a warm-up, not after it: all that can be told by two rows."""
        # Reading rows may draw random numbers too, as augmentation does.
        with eval_mode(model):
            rows = [
                self.data.dataset[j] for j in range(min(2, args.per_device_train_batch_size, len(self.data.dataset)))
            ]
        require_scorable(
            model,
            rows,
            collate,
            task=self._task(args, model),
            own_loss=self.task is None and not args.label_smoothing_factor,
            rule=self.rule,
            autocast=self._autocast(args),
        )

    def _task(self, args: TrainingArguments, model: nn.Module) -> Task:
        return self.task or task_of(model, label_smoothing=args.label_smoothing_factor)

    def _autocast(self, args: TrainingArguments) -> torch.dtype | None:
        lookahead = any(term.lookahead for term in self.terms.values())
        return torch.bfloat16 if args.bf16 and not lookahead else None

    def _try_scoring(self, args: TrainingArguments, state: TrainerState, model: nn.Module, collate: Any) -> None:
        outcome = self._score(args, state, model, collate)
        distributed.require_same("scores", outcome if isinstance(outcome, str) else outcome.quality.tobytes())
        if isinstance(outcome, str):
            self._not_yet(outcome, state)
            return
        outcome = self._guarded(outcome)
        self.scorings += 1
        if distributed.is_first():
            path = self._path(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            outcome.save(path)
            self._digest = digest(path, sync=True)
        self._use(outcome, epoch_of(state))

    def _score(self, args: TrainingArguments, state: TrainerState, model: nn.Module, collate: Any) -> Scores | str:
        """The scores, or why the model cannot give any yet."""
        try:
            return score(
                model,
                self.data.dataset,
                collate,
                rule=self.rule,
                task=self._task(args, model),
                rows=replace(self.rows, about={"epoch": epoch_of(state), "step": state.global_step, **self.rows.about}),
                compute=Compute(args.per_device_train_batch_size, self._autocast(args), progress=self.progress),
            )
        except NotLearnedError as error:
            return str(error)

    def _guarded(self, scores: Scores) -> Scores:
        if not self.rule.guard:
            return scores
        scores, test = guarded(scores, self.data.plan.fraction)
        if test is not None and not test.passed:
            warnings.warn(f"rows are drawn at random, not by Q: {test.told}", stacklevel=2)
        return scores

    def _use(self, scores: Scores, epoch: int) -> None:
        self.data.plan = self.data.plan.scored(scores, epoch, by="QualityCallback")

    def _give_up(self) -> None:
        self.data.plan = self.data.plan.unscored(by="QualityCallback")

    def _not_yet(self, why: str, state: TrainerState) -> None:
        self.attempts.append(why)
        last = state.num_train_epochs - 1
        if epoch_of(state) >= min(WARMUP_LIMIT * state.num_train_epochs, last):
            self.refused = why
            self._give_up()
            warnings.warn(f"no quality sampling in this run, random draws go on: {why}", stacklevel=2)

    def _path(self, args: TrainingArguments) -> Path:
        return self.scores_path or Path(str(args.output_dir)) / SCORES_FILE


def _awaits(saved: QualityState) -> bool:
    """Whether scoring was still to come."""
    return saved.scored_epoch is None and saved.refused is None


def _require_same_scores(path: Path, sha256: str | None) -> None:
    """Raises DataError unless the file holds the scores that the run drew by."""
    if not path.exists():
        raise DataError(
            f"cannot resume: {path} is missing, the scores that the run drew by; put it back, resume from a checkpoint "
            "before the scoring, or start anew"
        )
    if digest(path) != sha256:
        raise DataError(f"{path} has other scores than the run had; resume with its own, or start anew")
