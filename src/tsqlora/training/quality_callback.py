"""The look at all rows in a stock Trainer: a fitted head, which rows are drawn, and what a training keeps of both.

State has one place each: the plan of the draws is the QualitySubset's, the question TrustedLast's, skipped steps
FiniteSteps', costs and run.json the record's; the callback has the looks, and writes all of it into checkpoints.
"""

import math
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.auditing.draw.subset import QualitySubset, hash_of_some
from tsqlora.auditing.head_start import start_head
from tsqlora.auditing.labels.question import why_unasked
from tsqlora.auditing.look import look, require_scorable
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.auditing.scores import Scores
from tsqlora.auditing.texts.raw import worst_findings
from tsqlora.auditing.texts.unfit import even_scores, in_one_line, look_before, without_unfit
from tsqlora.auditing.texts.vocabulary import Vocabulary, vocabulary_of_answers
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.files import digest
from tsqlora.libs.accelerate import row_sampler
from tsqlora.libs.transformers import knows_lengths, live_note
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.request import Compute, LookRequest, RowNames, ScoringRule
from tsqlora.model.terms import TERMS
from tsqlora.progress import Progress, bars
from tsqlora.record import PhaseCost, RunRecord, question_in_words
from tsqlora.rows.datasets import LABELS
from tsqlora.run_dir import SCORES_FILE, first_scores
from tsqlora.tasks import Collate, Task, task_of
from tsqlora.training.checkpoints import (
    ROWS_HASH,
    begin_saves,
    checkpoint_folder,
    date_by_step,
    read_state,
    require_options,
    set_aside,
    write_manifest,
    write_state,
)
from tsqlora.training.live_record import EPOCH_ERROR, LiveRecord, epoch_of, half_precision, own_record
from tsqlora.training.nonfinite import FiniteSteps
from tsqlora.training.trusted_last import Schedule, TrustedLast

QUALITY_FILE = "tsqlora_quality.json"
"""The callback's state in a checkpoint, beside the scores, which are in another file."""


class QualityCallback(TrainerCallback):
    """Looks at the rows of a QualitySubset before the first step: fits a new head, and decides which rows are drawn.

    A head that is fitted on the features replaces the model's own if its out-of-fold loss is lower by two standard
    errors. Rows whose label seems wrong are left out where there is evidence of wrong labels; the rule says how the
    others are drawn. With trusted rows the run trains on the pool first, without a tenth of it; then it asks by their
    losses whether the pool contradicts the trusted rows. If so, it ends with these alone, else both are mixed in. From
    the start texts, fewer than 32 rows, and rows that lack a class are mixed in. A run of several epochs measures Q
    again after a third of its steps.

    Steps whose loss or gradient is not finite are skipped and counted; if five of the last ten were, training ends with
    a TsqLoraError, which gives advice and names the last complete checkpoint before them. Each of the Trainer's
    checkpoints becomes complete, so that a resumed run ends with the same bytes, and run.json is written.

    Args:
        data: the Trainer's train_dataset.
        rule: the terms to measure, and how they decide the draw; its reference is a number of rows.
            ScoringRule(select=False, head_start=False) draws random rows, without a look.
        task: needed only for a custom loss, such as class weights.
        rows: ids and hashes of the rows, and further fields of the scores' record.
        scores_path: where scores are written; by default scores.parquet in the output_dir.
        progress: called with (phase, rows done, rows in all); by default a bar where the Trainer shows bars.
        collate: makes the batches to score; by default the Trainer's collator; each row of a batch is a sample.
        look: a folder of `tsqlora look` or `tsqlora.look`, in place of a look: under FSDP2 and DeepSpeed too. Its head
            is written before anything is sharded, and no second look follows.

    Scores are computed in training's precision, unless `loss_reduction` is measured: that
    is a small difference, and needs float32.

    `looks` has a summary of each look. Raises SettingsError for options that contradict each other; before the first
    step SettingsError or UnsupportedError naming what cannot be scored or drawn; TsqLoraError naming the file of a
    checkpoint that is damaged.
    """

    into: tuple[RunRecord, Path | None] | None = None
    """The record of `tsqlora train` and the folder of its run.json; None: the callback makes one."""

    def __init__(
        self,
        data: QualitySubset,
        *,
        rule: ScoringRule | None = None,
        task: Task | None = None,
        rows: RowNames | None = None,
        scores_path: str | Path | None = None,
        progress: Progress | None = None,
        collate: Collate | None = None,
        look: str | Path | None = None,
    ) -> None:
        if not isinstance(data, QualitySubset):
            raise SettingsError(
                f"QualityCallback got a {type(data).__name__}; it goes with a QualitySubset: make data = "
                "tsqlora.QualitySubset(rows), and give it to the Trainer too"
            )
        self.data = data
        self.saved = None if look is None else SavedLook.load(look)
        self.rule = rule or (ScoringRule() if self.saved is None else self.saved.rule)
        if self.saved is not None and self.rule.select:
            self.saved.require_rule(self.rule)
        if not isinstance(self.rule.reference, int):
            raise SettingsError(
                "QualityCallback chooses its reference rows; give ScoringRule(reference=...) their number"
            )
        self.rule.require_trusted(len(data.trusted) > 0)
        first = [row for rows in (data.dataset, data.trusted) if len(rows) and isinstance(row := rows[0], Mapping)]
        if len({frozenset({"input_ids", "completion_mask", *LABELS} & row.keys()) for row in first}) > 1:
            ours, theirs = map(", ".join, first)
            raise SettingsError(f"the rows have {ours}, and the trusted rows {theirs}; prepare both alike")
        self.task, self.rows = task, rows or RowNames()
        self.scores_path = None if scores_path is None else Path(scores_path)
        self.progress, self.collate = progress, collate
        self.finite = FiniteSteps()
        self.looks: list[dict[str, Any]] = []
        self.notes: list[str] = []
        """Warnings, for the record."""
        self._left_out: str | None = None
        self._written: weakref.ref[nn.Module] | None = None
        self._rows_hash: str | None = None

    @property
    def _needs_model(self) -> bool:
        """Whether rows go through the model, or its head is replaced: an engine may not have sharded it before."""
        return self.rule.select or self.rule.head_start or self.saved is not None

    @property
    def question(self) -> dict[str, Any] | None:
        """The answer of the pool, or why there is none; None before."""
        return self.last.question

    @property
    def why_not(self) -> str | None:
        """Why the last look could not rank the rows; None if it could."""
        return self.looks[-1]["not_ready"] if self.looks else None

    # ---------------------------------------------------------------------------------- events of the Trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._needs_model:
            distributed.refuse_sharded_loading(kwargs["model"])
        if self.saved is not None:
            self.write_head(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, loader, data = kwargs["model"], kwargs["train_dataloader"], self.data
        if self._needs_model:
            distributed.refuse_sharded_loading(model)
        if loader.dataset is not data:
            raise SettingsError(
                "QualityCallback(data) and Trainer(train_dataset=data) need the same QualitySubset; for a trainer that "
                "makes its own rows, such as SFTTrainer, choose them before it is built: dataset = "
                "tsqlora.select(model, dataset, processing_class=tokenizer, trusted=rows, fraction=0.2)"
            )
        require_fresh_draws(args, loader)
        if live_note(state).setdefault("draws", id(self)) != id(self):
            raise SettingsError("the Trainer has two QualityCallbacks; give it one at most")
        self._earlier, resumed = begin_saves(args, state)
        saved = None if resumed is None else read_state(resumed / QUALITY_FILE)
        if data.seed is None:
            data.plan = replace(data.plan, seed=args.seed)
        data.task = self.task
        self._begin(args, state, saved, loader, model, kwargs.get("processing_class"))
        skipped = [] if saved is None else saved["skipped"]
        self.finite.begin(args, model, kwargs["optimizer"], skipped)
        if args.deepspeed_plugin is not None:
            self.notes.append("DeepSpeed takes its own steps, so steps that are not finite are not undone")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not on train begin: a callback that refuses to begin leaves the folder as it was.
        if self._earlier is not None:
            set_aside(Path(str(args.output_dir)), after=self._earlier)
            self._earlier = None
        self._look_again(args, state, kwargs["model"], kwargs["train_dataloader"].collate_fn)
        # accelerate tells a data set its epoch only in some cases.
        self.data.begin_epoch(epoch_of(state))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.record.begin_step(state)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.finite.check(args, state, kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.record.end_step(args, state, self.data):
            self.record.write_now(state, self.summary())
        if self.last.waits and state.global_step >= self.last.schedule.asks_step:
            self._ask(args, state, **kwargs)
        self.last.close_validation(state, control)
        self.last.end_step(args, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.data.drawn_by is None:
            return
        if kwargs["eval_dataloader"].dataset is self.data:  # its rows would count as handed out for training
            raise SettingsError(
                "eval_dataset is the QualitySubset that is trained on; to evaluate on training rows give "
                "another data set: torch.utils.data.Subset(rows, data.draw(0))"
            )
        self.last.stops(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.data.drawn_by is not None:
            self._ask_early(args, state, control, **kwargs)
        elif hasattr(self, "record"):
            self.record.evaluated(state, kwargs["metrics"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ask_early(args, state, control, **kwargs)  # EarlyStoppingCallback may come after this callback
        folder = checkpoint_folder(args, state)
        write_state(folder / QUALITY_FILE, self._state())
        if not args.save_only_model:
            distributed.wait()  # each process writes its own random state
            if distributed.is_first():
                write_manifest(folder, also=live_note(state).get("files", ()))
                date_by_step(folder.parent)
        self.last.close_validation(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ask_early(args, state, control, **kwargs)
        if control.should_epoch_stop and not control.should_training_stop:
            # The Trainer counts on, but its state would be within this epoch, and the next one draw the same rows.
            state.epoch = float(math.ceil((state.epoch or 0) - EPOCH_ERROR))
        self.last.close_validation(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.data.drawn_by = None  # `QualitySubset.set_epoch` draws again
        self.finite.close()
        if (none := self.last.end(state)) is not None:
            self._note(none)
        self.record.end(args, state, kwargs["model"], self.summary())

    # ---------------------------------------------------------------------------------- state and record

    def summary(self) -> dict[str, Any]:
        """Fields of the record: how rows were drawn, the looks, and the reasons."""
        data, scores = self.data, self.data.scores
        quality = {"enabled": self.rule.select, "used": scores is not None, "fraction": data.plan.fraction}
        quality |= {"rows_an_epoch": len(data), "trusted_rows": len(data.trusted), "looks": self.looks}
        quality |= {"why_not": self.why_not} if scores is None else {"scores": scores.record.to_dict()}
        notes, twins, noise = [*self.notes], data.plan.excluded, None if scores is None else scores.record.noise
        if len(data.trusted) and self.looks:
            quality["question"] = self.last.summary()
            if self.question is not None and "why_not" in self.question:
                notes.append(question_in_words(self.question))
            if twins is not None:
                notes.append(f"{twins.sum()} training rows are left out: a trusted row has the same input")
        if scores is not None and noise is not None and noise["evident"]:
            bounds = f" ({noise['low']:.0%} to {noise['high']:.0%})" if noise["high"] < 1 else ""
            wrong = f"{scores.left_out_as('confident negative').sum()} of {len(scores)} rows were left out"
            notes.append(f"about {noise['rate']:.0%} of the labels seem wrong{bounds}: {wrong}")
            notes += [scores.caution] if scores.caution else []
        elif noise is not None:
            notes.append("no evidence of wrong labels: every row may be drawn")
        notes += self.finite.in_words()
        settings = {"quality": self._draws()}
        return {"quality": quality, "skipped": self.finite.summary(), "notes": notes, "settings": settings}

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "draws": self._draws(),
            "looks": self.looks,
            "scored_epoch": None if self.data.scores is None else self.data.plan.scored_epoch,
            "scores_sha256": self._digest,
            "question": self.question,
            "skipped": self.finite.skipped,
            "notes": self.notes,
            "cost": {phase: asdict(cost) for phase, cost in self.record.record.cost.items()},
        }

    def _draws(self) -> dict[str, Any]:
        data, plan = self.data, self.data.plan
        about: dict[str, Any] = {name: getattr(plan, name) for name in ("rows", "fraction", "seed", "resample")}
        rule = {f.name: getattr(self.rule, f.name) for f in fields(self.rule) if f.name not in ("terms", "seed")}
        rule["weights"] = None if self.rule.weights is None else dict(self.rule.weights)
        if self._rows_hash is not None:
            about[ROWS_HASH] = self._rows_hash
        rule["look"] = None if self.saved is None else digest(self.saved.path / SCORES_FILE)
        about |= {"batch_size": data.batch_size, "terms": list(self.rule.measured()), "trusted rows": data.trusted_hash}
        return {**about, **rule, "seed to score": self.rule.seed}

    def _resume(self, saved: Mapping[str, Any]) -> None:
        self.looks, self.notes, self._digest = saved["looks"], saved["notes"], saved["scores_sha256"]
        self.record.record.cost |= {phase: PhaseCost(**cost) for phase, cost in saved["cost"].items()}
        self.last.resume(saved["question"])
        if self._digest is None:
            return
        # If the run went on after this checkpoint, the first look's scores have another name.
        paths = [path for path in (self._path, first_scores(self._path)) if path.exists()]
        path = distributed.once(lambda: next((p for p in paths if digest(p) == self._digest), None))
        if path is None:
            what = "holds other scores than the run's" if paths else "is missing"
            raise DataError(f"cannot resume: {self._path} {what}; put it back, or start again")
        self._first = Scores.load(path)
        self.data.plan = self.data.plan.holding_out(self._first)
        if saved["scored_epoch"] is not None:
            self.data.plan = self.data.plan.scored(self._first, saved["scored_epoch"])

    # ---------------------------------------------------------------------------------- the look

    def write_head(self, model: nn.Module) -> None:
        """Write the head of the look into the model, before a Trainer shards it.

        The Trainer's own callbacks do so by themselves; one that is added later needs the call.
        """
        assert self.saved is not None
        self._left_out = self.saved.write_head(model)
        self._written = weakref.ref(distributed.unwrapped(model))

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        saved: Mapping[str, Any] | None,
        loader: Any,
        model: nn.Module,
        tokenizer: Any,
    ) -> None:
        """Check what the look needs, and take it, or go on from a checkpoint's state."""
        data, task, collate = self.data, self._task(args, model), loader.collate_fn
        self._path = self.scores_path or Path(str(args.output_dir)) / SCORES_FILE
        with eval_mode(model):  # reading rows may draw random numbers, as augmentation does
            self._rows_hash = hash_of_some(data.dataset)
        looks = self.rule.decides(task, len(data.trusted) > 0) and self.saved is None
        if self.saved is None:
            if self._needs_model:
                distributed.require_whole(model, args.deepspeed_plugin)
        else:
            self.saved.require_rows(data.dataset, data.trusted, self.rows)
            if saved is None and (self._written is None or self._written() is not distributed.unwrapped(model)):
                self._write_late(args, model)
        if saved is not None:
            require_options(saved["draws"], self._draws())
        elif looks:
            self._require_scorable(args, model, collate)
        self.looks, self.notes, self._digest, self._first, self._answers = [], [], None, None, None
        data.plan = data.plan.unscored(awaits_scores=looks and (saved is None or len(saved["looks"]) < 2))
        self.last = TrustedLast(data, Schedule.of(data, args, state, len(loader)))
        record, folder = self.into or (own_record(args, state, model, data, self.task), Path(str(args.output_dir)))
        self.record = LiveRecord(record, folder, finishes=self.into is None)
        if self.rule.select and len(data.trusted):
            behind = self.last.schedule.trusted_step < state.max_steps
            too_short = None if behind else f"a run of {state.max_steps} steps has none behind the question"
            self.last.plan(why_unasked(data.trusted, data.suspects, task, model, self.collate or collate) or too_short)
        if data.plan.asks is not None or "from" in ((saved or {}).get("question") or {}):
            read_in_order(loader, data)
        if (vocabulary := vocabulary_of_answers(tokenizer, distributed.unwrapped(model))) is not None:
            self._look_at_texts(args, model, collate, vocabulary, answers=saved is None and self.saved is None)
        if saved is not None:
            state.epoch = state.global_step / self.last.schedule.epoch_steps  # as the Trainer counts now
            self._resume(saved)
            self.last.close_validation(state)
        elif self.saved is not None:
            self._use(self.saved)
        elif looks:
            self._look(args, state, model, collate)
        elif self.rule.select:
            self._draw_texts_evenly(collate)
        elif self.rule.fits_head(task):  # the head only: for the control
            start = time.perf_counter()
            started = start_head(distributed.unwrapped(model), self._request(args, model, collate))
            self.looks.append(_even_look(None if started.head is None else started.head.summary()))
            self._spend("look", time.perf_counter() - start, forward=len(data.dataset) + len(data.trusted))

    def _look_again(self, args: TrainingArguments, state: TrainerState, model: nn.Module, collate: Collate) -> None:
        """Look again before the epoch that begins a third of the run's steps in, if its draws would change."""
        epoch = epoch_of(state)
        # A run resumed in the middle of an epoch begins it again, with weights that are further on.
        at_start = abs((state.epoch or 0) - epoch) < EPOCH_ERROR
        due = at_start and epoch == self.last.schedule.second_look and len(self.looks) == 1 and self.saved is None
        # Hidden states tell rows apart before any step, and training hardly changes which; even draws stay even.
        if due and self.rule.look_again and self.rule.select:
            scores = self.data.scores
            if scores is None or not (scores.even or {*scores.record.weights} <= {n for n in TERMS if TERMS[n].probe}):
                self._look(args, state, model, collate)

    def _ask_early(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask where EarlyStoppingCallback has stopped the pool's steps."""
        if self.last.is_due_early(state, control):
            self._ask(args, state, early=control, **kwargs)

    def _ask(
        self, args: TrainingArguments, state: TrainerState, *, early: TrainerControl | None = None, **kwargs: Any
    ) -> None:
        """Ask the pool whether it contradicts the trusted rows; the answer decides the draws from then on."""
        start, model = time.perf_counter(), kwargs["model"]
        request = self._request(args, model, kwargs["train_dataloader"].collate_fn)
        task = self.task or task_of(model)  # plain: training's own loss may be smoothed
        rows, words = self.last.ask(args, state, model, task, request, early=early)
        self._spend("question", time.perf_counter() - start, forward=rows)
        self._note(words)

    def _spend(self, phase: str, seconds: float, **passes: int) -> None:
        self.record.record.phase(phase).add(seconds=seconds, **passes)

    def _note(self, what: str) -> None:
        self.notes.append(what)
        warnings.warn(what, stacklevel=4)

    def _require_scorable(self, args: TrainingArguments, model: nn.Module, collate: Collate) -> None:
        """Check on two rows, before the look, what can be checked."""
        request, dataset = self._request(args, model, collate), self.data.dataset
        with eval_mode(model):
            rows = [dataset[j] for j in range(min(2, request.compute.batch_size, len(dataset)))]
        own = self.task is None and not args.label_smoothing_factor
        options = {"task": request.task, "own_loss": own, "rule": self.rule, "autocast": request.compute.autocast}
        require_scorable(model, rows, request.collate, **options)

    def _task(self, args: TrainingArguments, model: nn.Module) -> Task:
        return self.task or task_of(model, label_smoothing=args.label_smoothing_factor)

    def _request(self, args: TrainingArguments, model: nn.Module, collate: Collate, **about: Any) -> LookRequest:
        """A look at all rows; `about` is for the scores' record."""
        data, rows, progress = self.data, self.rows, self.progress
        if rows.lengths is None and data.lengths is not None:
            rows = replace(rows, lengths=data.lengths[: len(data.dataset)])
        if progress is None and not args.disable_tqdm and distributed.is_first():
            progress = bars(len(data.dataset))
        return LookRequest(
            dataset=data.dataset,
            collate=self.collate or collate,
            task=self._task(args, model),
            rule=self.rule,
            rows=replace(rows, about={**about, **rows.about}),
            compute=Compute(
                args.per_device_eval_batch_size,
                half_precision(args, self.rule),
                workers=args.dataloader_num_workers,
                progress=progress,
            ),
            trusted=data.trusted if len(data.trusted) else None,
            excluded=data.plan.excluded,
            asks=data.plan.asks is not None,
        )

    def _look(self, args: TrainingArguments, state: TrainerState, model: nn.Module, collate: Any) -> None:
        epoch = epoch_of(state)
        request = self._request(args, model, collate, epoch=epoch, step=state.global_step, look=len(self.looks) + 1)
        if self.looks:
            request = replace(request, rule=replace(self.rule, head_start=False), first=self._first)
        result = look(model, request)
        self._spend("look", **asdict(result.cost))
        scores, first, plan = result.scores, not self.looks, self.data.plan
        if first and self._answers is not None:
            scores = without_unfit(scores, self._answers)
            say = self._note if self._answers.lists else self.notes.append
            say(in_one_line(self._answers, scores.dropped, len(scores)))
        self._first = self._first or scores
        self.looks.append(scores.summary)
        if result.why_not is None or self.data.scores is None:
            self._save(scores)
        if result.why_not is None:
            self.data.plan = plan.scored(scores, epoch)
            self.last.hold_out(scores)
            return
        if self.data.scores is None:
            self.data.plan = replace(plan.unscored(awaits_scores=first), asks=plan.asks)
            self.last.hold_out(scores)
        more = "until the second look" if first and self.last.schedule.second_look else "to the end"
        self._note(f"rows are drawn evenly{' and ranks stay' if first else ''} {more}: {result.why_not}")

    def _write_late(self, args: TrainingArguments, model: nn.Module) -> None:
        """Write the head after the Trainer was made, where nothing holds another copy of the weights."""
        assert self.saved is not None
        if args.deepspeed_plugin is not None or any(map(distributed.parts_of, model.parameters())):
            raise UnsupportedError(
                "the engine has sharded the model's weights, so a head that is written now is lost; give "
                "QualityCallback(data, look=...) to Trainer(callbacks=[...]), or before trainer.train() call "
                "callback.write_head(trainer.model)"
            )
        self.write_head(model)

    def _use(self, saved: SavedLook) -> None:
        """Draw by a look in a folder; the control takes its head alone."""
        self.notes.append(f"the look comes from {saved.path}, taken by {saved.taken_by}; no second look follows")
        if self._left_out is not None:
            self._note(self._left_out)
        if not self.rule.select:
            self.looks.append(_even_look(saved.summary["head_start"]))
            return
        self.looks.append(saved.summary)
        self._first = saved.scores
        self._save(saved.scores)
        self.last.hold_out(saved.scores, f"the look in {saved.path}")
        if self.why_not is None:
            self.data.plan = self.data.plan.scored(saved.scores, 0)
        else:
            self._note(f"rows are drawn evenly to the end: {self.why_not}")

    def _save(self, scores: Scores) -> None:
        if distributed.is_first():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self.data.scores is not None:
                self.data.scores.save(first_scores(self._path))
            scores.save(self._path)
            self._digest = digest(self._path)

    def _look_at_texts(
        self, args: TrainingArguments, model: nn.Module, collate: Any, vocabulary: Vocabulary, *, answers: bool
    ) -> None:
        """Say what tokens and labels show, and find answers that do not fit, with the model as it is."""
        data = self.data
        if self.into is None:  # `tsqlora train` has looked itself
            for finding in worst_findings(data.dataset, vocabulary, collate=collate):
                self._note(finding)
        if not (answers and self.rule.select):
            return
        start, compute = time.perf_counter(), self._request(args, model, collate).compute
        how = {"collate": self.collate or collate, "seed": data.plan.seed}
        self._answers = look_before(distributed.unwrapped(model), data.dataset, vocabulary, compute, **how)
        tokens = sum(self._answers.tokens.values())
        self._spend("look", time.perf_counter() - start, forward=self._answers.read, tokens=tokens)
        self.notes += self._answers.sentences(faults=False)

    def _draw_texts_evenly(self, collate: Collate) -> None:
        """Without trusted rows no text is preferred; answers that do not fit are left out."""
        data, answers, line = self.data, self._answers, ""
        if answers is not None and answers.lists:
            dataset: Any = data.dataset
            scores = even_scores(dataset, self.collate or collate, self.rows, answers, seed=self.rule.seed)
            self._note(f"{in_one_line(answers, scores.dropped, len(scores))}; {self._path} names them")
            self.looks.append(scores.summary)
            self._save(scores)
            data.plan = data.plan.scored(scores, 0)
        elif answers is not None:
            self.notes.append(line := in_one_line(answers, {}, len(data.dataset)))
        self.notes.append("text without trusted rows is drawn evenly; name some in data.trusted")
        if self.into is None:  # `tsqlora train` shows notes at its end
            even = f"text without trusted rows is drawn evenly, {data.plan.fraction:.0%} of the rows an epoch"
            cure = "give QualitySubset(trusted=rows), or a fraction of 1"
            warnings.warn("; ".join(filter(None, (even, cure, line))), stacklevel=5)


def _even_look(head: dict[str, Any] | None) -> dict[str, Any]:
    """The summary of a look before the first step that ranks no rows."""
    return {"step": 0, "epoch": 0, "head_start": head, "not_ready": None}


def read_in_order(loader: Any, data: QualitySubset) -> None:
    """Make a loader read the rows in the draw's order.  Raises SettingsError for one that mixes them for good."""
    if isinstance(loader, DataLoaderShard | DataLoaderDispatcher):
        loader.set_sampler(SequentialSampler(data))
        return
    sampler = row_sampler(loader)
    if not isinstance(sampler, SequentialSampler):
        raise SettingsError(
            f"the Trainer's own get_train_dataloader mixes the rows ({type(sampler).__name__}), and trusted rows have "
            "their place in an epoch; return a DataLoader without shuffle, or leave the method out and set "
            "train_sampling_strategy to 'sequential'"
        )


def require_fresh_draws(args: TrainingArguments, loader: DataLoader[Any]) -> None:
    """Raises SettingsError for a loader of a QualitySubset that keeps an earlier draw or its rows' lengths.

    Its sampler is made once, from the first draw; the next one has other rows in the same places.
    """
    data: Any = loader.dataset
    if args.dataloader_persistent_workers:
        raise SettingsError("dataloader_persistent_workers keeps an old draw; set it to False")
    sampler = row_sampler(loader)
    if knows_lengths(sampler):
        raise SettingsError(
            f"{type(sampler).__name__} reads the rows' lengths once, and a QualitySubset has other rows in the next "
            "epoch; leave train_sampling_strategy out of the TrainingArguments, or set it to 'sequential' and let "
            "QualitySubset(rows, lengths=..., batch_size=...) group them"
        )
    if isinstance(sampler, RandomSampler) and data.lengths is not None:
        raise SettingsError(
            "QualitySubset(lengths=..., batch_size=...) puts rows of like length together, and the Trainer's sampler "
            "mixes them again; set train_sampling_strategy to 'sequential', or leave lengths and batch_size out"
        )
    if not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler | None):
        raise SettingsError(
            f"the Trainer's sampler is a {type(sampler).__name__}, which fits the first draw only: a QualitySubset has "
            "other rows in the same places in the next epoch; leave the sampler out of get_train_dataloader, and to "
            "see some rows more often repeat them in the data set"
        )
