"""The look at all rows in a stock Trainer: a fitted head, and which rows are drawn, before the first step."""

import math
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import nn
from torch.utils.data import SequentialSampler, Subset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from tsqlora import distributed
from tsqlora.compat.accelerate import inner_batch_sampler
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.files import digest
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.progress import Progress, bars
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.head_start import start_head
from tsqlora.quality.look import look, require_scorable
from tsqlora.quality.question import LEAST_HELD_OUT, ask, why_unasked
from tsqlora.quality.rule import Compute, LookRequest, RowNames, ScoringRule
from tsqlora.quality.saved_look import SavedLook
from tsqlora.quality.scores import Scores
from tsqlora.quality.subset import QualitySubset, hash_of_some, inputs_of
from tsqlora.quality.terms import TERMS
from tsqlora.tasks import Collate, Task, task_of
from tsqlora.text.before import even_scores, in_one_line, look_before, without_unfit, worst_findings
from tsqlora.text.look import AnswerLook
from tsqlora.text.vocabulary import Vocabulary, vocabulary_of_model
from tsqlora.training.checkpoints import ROWS_HASH, read_state, require_options, write_state
from tsqlora.training.record import question_in_words
from tsqlora.training.run_dir import SCORES_FILE
from tsqlora.training.session import PartCallback, of_draws, require_subset
from tsqlora.training.steps import EPOCH_ERROR, Schedule, epoch_of

QUALITY_FILE = "tsqlora_quality.json"
"""The callback's state in a checkpoint, beside the scores, which are in another file."""


class QualityCallback(PartCallback):
    """Looks at the rows of a QualitySubset before the first step: fits a new head, and decides which rows are drawn.

    A head that is fitted on the features replaces the model's own if its out-of-fold loss is lower by two standard
    errors. Rows whose label seems wrong are left out where there is evidence of wrong labels; the rule says how the
    others are drawn. With trusted rows the run trains on the pool first, without a tenth of it; then it asks by their
    losses whether the pool contradicts the trusted rows. If so, it ends with these alone, else both are mixed in. From
    the start texts, fewer than 32 rows, and rows that lack a class are mixed in. A run of several epochs measures Q
    again after a third of its steps.

    Args:
        data: the Trainer's train_dataset.
        rule: the terms to measure, and how they decide the draw; its reference is a number of rows.
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
    step SettingsError or UnsupportedError naming what cannot be scored or drawn.
    """

    name = "QualityCallback"
    data: QualitySubset

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
        require_subset(data, self.name)
        self.data = data
        self.saved = None if look is None else SavedLook.load(look)
        self.rule = rule or (ScoringRule() if self.saved is None else self.saved.rule)
        if self.saved is not None and self.rule.select:
            self.saved.require_rule(self.rule)
        self._left_out: str | None = None
        self._written: weakref.ref[nn.Module] | None = None
        if not isinstance(self.rule.reference, int):
            raise SettingsError(
                "QualityCallback chooses its reference rows; give ScoringRule(reference=...) their number"
            )
        self.rule.require_trusted(len(data.trusted) > 0)
        self.task, self.rows = task, rows or RowNames()
        self.scores_path = None if scores_path is None else Path(scores_path)
        self.progress, self.collate = progress, collate
        self.schedule = Schedule(0, 0, 0, None, 0, 1, 0)
        self._rows_hash: str | None = None
        self._forget()

    def _forget(self) -> None:
        self.notes = []
        self.looks: list[dict[str, Any]] = []
        self._spent: dict[str, PhaseCost] = {}
        self._digest: str | None = None
        self._first: Scores | None = None
        self._answers: AnswerLook | None = None
        self.question: dict[str, Any] | None = None
        self._stopped = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        distributed.refuse_sharded_loading(kwargs["model"])
        if self.saved is not None:
            self.write_head(kwargs["model"])

    def write_head(self, model: nn.Module) -> None:
        """Write the head of the look into the model, before a Trainer shards it.

        The Trainer's own callbacks do so by themselves; one that is added later needs the call.
        """
        assert self.saved is not None
        self._left_out = self.saved.write_head(model)
        self._written = weakref.ref(distributed.unwrapped(model))

    def begin(self, args: TrainingArguments, state: TrainerState, resumed: Path | None, **kwargs: Any) -> None:
        distributed.refuse_sharded_loading(kwargs["model"])
        loader, model, data = kwargs["train_dataloader"], kwargs["model"], self.data
        if loader.dataset is not data:
            raise SettingsError(
                "QualityCallback(data) and Trainer(train_dataset=data) need the same QualitySubset; for a trainer that "
                "makes its own rows, such as SFTTrainer, choose them before it is built: dataset = "
                "tsqlora.select(model, dataset, processing_class=tokenizer, trusted=rows, fraction=0.2)"
            )
        self.schedule = Schedule.of(data, args, state, len(loader))
        self._path = self.scores_path or Path(str(args.output_dir)) / SCORES_FILE
        with eval_mode(model):  # reading rows may draw random numbers, as augmentation does
            self._rows_hash = hash_of_some(data.dataset)
        saved = None if resumed is None else read_state(resumed / QUALITY_FILE)
        task = self._task(args, model)
        looks = self.rule.decides(task, len(data.trusted) > 0) and self.saved is None
        if self.saved is None:
            if looks or self.rule.select or self.rule.head_start:
                distributed.require_whole(model, args.deepspeed_plugin)
        else:
            self.saved.require_rows(data.dataset, data.trusted, self.rows)
            if saved is None and (self._written is None or self._written() is not distributed.unwrapped(model)):
                self._write_late(args, model)
        if saved is not None:
            require_options(saved["draws"], self._draws())
        elif looks:
            self._require_scorable(args, model, loader.collate_fn)
        awaits = looks and (saved is None or len(saved["looks"]) < 2)
        self._forget()
        data.plan = data.plan.unscored(awaits_scores=awaits, by=self.name)
        if self.rule.select and len(data.trusted):
            about = (data.trusted, data.suspects, task, model, self.collate or loader.collate_fn)
            too_short = None if self.schedule.asks else f"a run of {state.max_steps} steps has none behind the question"
            self._plan_question(why_unasked(*about) or too_short)
        if data.plan.asks is not None or "from" in ((saved or {}).get("question") or {}):
            read_in_order(loader, data)
        data.task = self.task
        tokenizer = kwargs.get("processing_class")
        if task.reading.causal and getattr(tokenizer, "is_fast", False):
            answers = saved is None and self.saved is None
            self._look_at_texts(args, task, model, loader.collate_fn, tokenizer, answers=answers)
        if saved is not None:
            self._resume(saved)
            self._close_validation(state)
        elif self.saved is not None:
            self._use(self.saved)
        elif looks:
            self._look(args, state, model, loader.collate_fn)
        elif self.rule.select:
            self._draw_texts_evenly(loader.collate_fn)
        elif self.rule.head_start and task.writer is None:  # the head only: for the control
            start = time.perf_counter()
            started = start_head(distributed.unwrapped(model), self._request(args, model, loader.collate_fn, {}))
            head = None if started.head is None else started.head.summary()
            self.looks.append({"step": 0, "epoch": 0, "head_start": head, "not_ready": None})
            self._spent["look"] = PhaseCost(time.perf_counter() - start, len(data.dataset) + len(data.trusted))

    def _require_scorable(self, args: TrainingArguments, model: nn.Module, collate: Collate) -> None:
        """Check on two rows, before the look, what can be checked."""
        request = self._request(args, model, collate, {})
        compute, dataset = request.compute, self.data.dataset
        with eval_mode(model):
            rows = [dataset[j] for j in range(min(2, compute.batch_size, len(dataset)))]
        own = self.task is None and not args.label_smoothing_factor
        options = {"task": request.task, "own_loss": own, "rule": self.rule, "autocast": compute.autocast}
        require_scorable(model, rows, request.collate, **options)

    def _draw_texts_evenly(self, collate: Collate) -> None:
        """Without trusted rows no text is preferred; answers that do not fit are left out."""
        line = ""
        if self._answers is not None and self._answers.lists:
            self._draw_fitting(self._answers, collate)
        elif self._answers is not None:
            line = in_one_line(self._answers, {}, len(self.data.dataset))
            self.notes.append(line)
        self.notes.append("text without trusted rows is drawn evenly; name some in data.trusted")
        if self.into is None:  # `tsqlora train` shows notes at its end
            share = f"{self.data.plan.fraction:.0%} of the rows an epoch"
            cure = "give QualitySubset(trusted=rows), or a fraction of 1"
            what = "; ".join([f"text without trusted rows is drawn evenly, {share}", cure, *([line] if line else [])])
            warnings.warn(what, stacklevel=5)

    def begin_epoch(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        epoch = epoch_of(state)
        # A run resumed in the middle of an epoch begins it again, with weights that are further on.
        at_start = abs((state.epoch or 0) - epoch) < EPOCH_ERROR
        if self.saved is not None or not (at_start and epoch == self.schedule.second_look and len(self.looks) == 1):
            return
        # Hidden states tell rows apart before any step, and training hardly changes which; even draws stay even.
        scores = self.data.scores
        stays = scores is not None and (
            scores.even or all(name in TERMS and TERMS[name].probe for name in scores.record.weights)
        )
        if self.rule.look_again and self.rule.select and not stays:
            self._look(args, state, kwargs["model"], kwargs["train_dataloader"].collate_fn)

    def save_part(self, folder: Path) -> None:
        write_state(
            folder / QUALITY_FILE,
            {
                "looks": self.looks,
                "scored_epoch": None if self.data.scores is None else self.data.plan.scored_epoch,
                "scores_sha256": self._digest,
                "spent": {phase: asdict(cost) for phase, cost in self.spent.items()},
                "draws": self._draws(),
                "notes": self.notes,
                "question": self.question,
            },
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self._waits and state.global_step >= self.schedule.asks_step:
            self._ask(args, state, self.schedule.trusted_step, **kwargs)
        self._close_validation(state, control)
        if state.global_step >= (self.question or {}).get("until_step", math.inf):
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS  # as the Trainer does at its last step

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        self._stopped = control.should_training_stop  # before EarlyStoppingCallback has seen this evaluation

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        self._ask_early(args, state, control, **kwargs)

    def begin_save(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        self._ask_early(args, state, **kwargs)  # EarlyStoppingCallback may come after this callback

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_save(args, state, control, **kwargs)
        self._close_validation(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ask_early(args, state, control, **kwargs)
        super().on_epoch_end(args, state, control, **kwargs)
        self._close_validation(state, control)

    @property
    def _waits(self) -> bool:
        """Whether the question to the pool is still to come."""
        return self.question is None and self.data.plan.asks is not None

    def _ask_early(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where EarlyStoppingCallback has stopped the pool's steps, ask; contradicted, the epoch ends and R follows."""
        at = state.global_step
        evaluated = any(name.startswith("eval_") for log in state.log_history if log["step"] == at for name in log)
        stopped = control.should_training_stop and not self._stopped and evaluated and stops_early(state)
        if not (self._waits and stopped):
            return
        between = abs((state.epoch or 0) - epoch_of(state)) < EPOCH_ERROR
        self.data.plan = replace(self.data.plan, asks=(epoch_of(state) + (not between), 0))
        question = self._ask(args, state, at, **kwargs)
        if question["contradicted"]:
            question["until_step"] = at + self.schedule.steps - self.schedule.trusted_step
            control.should_training_stop, control.should_epoch_stop = False, True

    def _ask(self, args: TrainingArguments, state: TrainerState, first: int, **kwargs: Any) -> dict[str, Any]:
        """Ask the pool whether it contradicts the trusted rows; the answer decides the draws from this step on."""
        start, data = time.perf_counter(), self.data
        assert data.plan.held_out is not None
        held = np.flatnonzero(data.plan.held_out)
        rows, few = cast(Any, data.dataset), cast(Any, data.trusted)
        trusted = Subset(few, np.flatnonzero(~data.suspects).tolist())
        pool = Subset(rows, held[np.unique(inputs_of(Subset(rows, held.tolist())))].tolist())  # one of its copies
        model: nn.Module = kwargs["model"]
        request = self._request(args, model, kwargs["train_dataloader"].collate_fn, {})
        task = self.task or task_of(model)  # plain: training's own loss may be smoothed
        compute = replace(request.compute, workers=0, progress=None)
        answer = ask(model, trusted, pool, request.collate, task, compute)
        when = {"step": state.global_step, "from_step": first + 1, "from": list(data.plan.asks or ())}
        self.question = {**when, **answer, "suspects": int(data.suspects.sum())}
        data.answer(contradicted=answer["contradicted"])
        self._spent["question"] = PhaseCost(time.perf_counter() - start, len(trusted) + len(pool))
        words = question_in_words(self.question)
        if answer["contradicted"] and args.load_best_model_at_end:
            words += "; it keeps its last model, since validation rows that are like the pool would choose another"
        if answer["contradicted"] and stops_early(state):
            words += "; it does not evaluate in these steps, since such rows would stop it"
        self._note(words)
        return self.question

    def _close_validation(self, state: TrainerState, control: TrainerControl | None = None) -> None:
        """Where trusted rows come last, validation rows, which are like the pool, choose neither model nor end."""
        if self.question is not None and self.question.get("contradicted"):
            state.best_model_checkpoint = None
            if control is not None:
                control.should_evaluate &= not stops_early(state)

    def end(self, state: TrainerState) -> None:
        first = (self.question or {}).get("from_step", self.schedule.trusted_step + 1)
        if self.data.plan.asks is not None and state.global_step < first:
            none = f"training ended at step {state.global_step}, and trusted rows come from step {first} on: none was "
            none += "trained on; train longer, or stop later"
            if stops_early(state):
                none += ", or name EarlyStoppingCallback before QualityCallback: then the question comes when it stops"
            self.question = {**(self.question or {"from": list(self.data.plan.asks)}), "unasked": none}
            self._note(none)
        self.data.plan = replace(self.data.plan, asks=None)  # the next training has its own

    @property
    def spent(self) -> dict[str, PhaseCost]:
        return self._spent

    def summary(self) -> dict[str, Any]:
        """Fields of the record: how rows were drawn, the looks, and the reasons."""
        data, scores = self.data, self.data.scores
        quality = of_draws(data) | {"enabled": self.rule.select, "used": scores is not None, "looks": self.looks}
        quality |= {"why_not": self.why_not} if scores is None else {"scores": scores.record.to_dict()}
        notes, twins, noise = [*self.notes], data.plan.excluded, None if scores is None else scores.record.noise
        if len(data.trusted) and self.looks:
            waits = {
                "unasked": f"the question to the pool comes after step {self.schedule.asks_step}",
                "from": list(data.plan.asks or ()),
            }
            quality["question"] = waits if self._waits else self.question
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
        return {"quality": quality, "notes": notes, "settings": {"quality": self._draws()}}

    @property
    def why_not(self) -> str | None:
        """Why the last look could not rank the rows; None if it could."""
        return self.looks[-1]["not_ready"] if self.looks else None

    def _plan_question(self, why_not: str | None) -> None:
        """Plan the question to the pool, or mix trusted rows in and say why."""
        if why_not is None:
            place = self.schedule.place_of(self.schedule.trusted_step)
            self.data.plan = replace(self.data.plan, asks=place)
        else:
            self.data.plan, self.question = replace(self.data.plan, asks=None), {"why_not": why_not}

    def _hold_out(self, scores: Scores, source: str = "the pool") -> None:
        """Plan the rows that a look holds out; without enough of them trusted rows are mixed in."""
        self.data.plan = plan = self.data.plan.holding_out(scores)
        held = 0 if plan.held_out is None else int(plan.held_out.sum())
        if plan.asks is not None and held < LEAST_HELD_OUT:
            self._plan_question(f"{source} has {held} rows to hold out, and the question needs {LEAST_HELD_OUT}")

    def _draws(self) -> dict[str, Any]:
        data, plan = self.data, self.data.plan
        about: dict[str, Any] = {name: getattr(plan, name) for name in ("rows", "fraction", "seed", "resample")}
        rule = {f.name: getattr(self.rule, f.name) for f in fields(self.rule) if f.name not in ("terms", "seed")}
        rule["weights"] = None if self.rule.weights is None else dict(self.rule.weights)
        if self._rows_hash is not None:
            about[ROWS_HASH] = self._rows_hash
        decides = {"terms": list(self.rule.measured()), "trusted rows": data.trusted_hash, **rule}
        decides["look"] = None if self.saved is None else digest(self.saved.path / SCORES_FILE)
        return {**about, "batch_size": data.batch_size, **decides, "seed to score": self.rule.seed}

    def _resume(self, saved: Mapping[str, Any]) -> None:
        self.looks, self._digest = saved["looks"], saved["scores_sha256"]
        self._spent = {phase: PhaseCost(**cost) for phase, cost in saved["spent"].items()}
        self.notes, self.question = saved.get("notes", []), saved["question"]
        if (question := self.question) is not None:
            plan = replace(self.data.plan, contradicted=question.get("contradicted", False))
            place = tuple(question["from"]) if "from" in question else None
            if "from_step" in question and (self.schedule.skipped or "until_step" in question):
                # Its epochs had other steps than they have in the Trainer now.
                place = self.schedule.place_of(question["from_step"] - 1)
            self.data.plan = replace(plan, asks=place)
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
            self.data.plan = self.data.plan.scored(self._first, saved["scored_epoch"], by=self.name)

    def _task(self, args: TrainingArguments, model: nn.Module) -> Task:
        return self.task or task_of(model, label_smoothing=args.label_smoothing_factor)

    def _request(
        self, args: TrainingArguments, model: nn.Module, collate: Collate, about: Mapping[str, Any]
    ) -> LookRequest:
        """A look at all rows; `about` is for the scores' record."""
        data, rows, progress = self.data, self.rows, self.progress
        if rows.lengths is None and data.lengths is not None:
            rows = replace(rows, lengths=data.lengths[: len(data.dataset)])
        if progress is None and not args.disable_tqdm and distributed.is_first():
            progress = bars(len(data.dataset))
        lookahead = any(term.lookahead for term in self.rule.measured().values())
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        return LookRequest(
            dataset=data.dataset,
            collate=self.collate or collate,
            task=self._task(args, model),
            rule=self.rule,
            rows=replace(rows, about={**about, **rows.about}),
            compute=Compute(
                args.per_device_eval_batch_size,
                None if lookahead else half,
                workers=args.dataloader_num_workers,
                progress=progress,
            ),
            trusted=data.trusted if len(data.trusted) else None,
            excluded=data.plan.excluded,
            asks=data.plan.asks is not None,
        )

    def _look(self, args: TrainingArguments, state: TrainerState, model: nn.Module, collate: Any) -> None:
        epoch = epoch_of(state)
        about = {"epoch": epoch, "step": state.global_step, "look": len(self.looks) + 1}
        request = self._request(args, model, collate, about)
        if self.looks:
            request = replace(request, rule=replace(self.rule, head_start=False), first=self._first)
        result = look(model, request)
        self._spent.setdefault("look", PhaseCost()).add(**asdict(result.cost))
        scores, first, plan = result.scores, not self.looks, self.data.plan
        if first and self._answers is not None:
            scores = without_unfit(scores, self._answers)
            say = self._note if self._answers.lists else self.notes.append
            say(in_one_line(self._answers, scores.dropped, len(scores)))
        self._first = self._first or scores
        summary = {name: getattr(scores.record, name) for name in ("epoch", "step", "head_start", "noise", "gate")}
        counts = {"rows": len(scores), "kept": int(scores.kept.sum())} | scores.counted("held out")
        self.looks.append({**summary, "not_ready": result.why_not, **counts})
        if result.why_not is None or self.data.scores is None:
            self._save(scores)
        if result.why_not is None:
            self.data.plan = plan.scored(scores, epoch, by=self.name)
            self._hold_out(scores)
            return
        if self.data.scores is None:
            # Later ranks may move all the same: what the model learns until its end shows in its gradients.
            self.data.plan = replace(plan.unscored(awaits_scores=first, by=self.name), asks=plan.asks)
            self._hold_out(scores)
        more = "until the second look" if first and self.schedule.second_look else "to the end"
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
            self.looks.append({"step": 0, "epoch": 0, "head_start": saved.summary["head_start"], "not_ready": None})
            return
        self.looks.append(saved.summary)
        self._first = saved.scores
        self._save(saved.scores)
        self._hold_out(saved.scores, f"the look in {saved.path}")
        if self.why_not is None:
            self.data.plan = self.data.plan.scored(saved.scores, 0, by=self.name)
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
        self, args: TrainingArguments, task: Task, model: nn.Module, collate: Any, tokenizer: Any, *, answers: bool
    ) -> None:
        """Say what tokens and labels show, and look at the answers."""
        own: Any = model
        about = (tokenizer, own.config, own.generation_config)
        vocabulary = vocabulary_of_model(*about, size_of=distributed.unwrapped(model))
        if self.into is None and task.writer is not None:  # `tsqlora train` has looked itself
            for finding in worst_findings(self.data.dataset, vocabulary, collate=collate):
                self._note(finding)
        if answers and self.rule.select:
            self._answers = self._look_at_answers(args, model, collate, vocabulary)

    def _look_at_answers(
        self, args: TrainingArguments, model: nn.Module, collate: Collate, vocabulary: Vocabulary
    ) -> AnswerLook:
        """Find answers that do not fit, with the model as it is."""
        start, data = time.perf_counter(), self.data
        compute = self._request(args, model, collate, {}).compute
        unwrapped, seed = distributed.unwrapped(model), data.plan.seed
        look = look_before(unwrapped, data.dataset, vocabulary, compute, collate=self.collate or collate, seed=seed)
        cost = PhaseCost(time.perf_counter() - start, tokens=sum(look.tokens.values()))
        self._spent.setdefault("look", PhaseCost()).add(**asdict(cost))
        self.notes += look.sentences(faults=False)
        return look

    def _draw_fitting(self, answers: AnswerLook, collate: Collate) -> None:
        """Draw evenly from all rows whose answers fit."""
        data = self.data
        scores = even_scores(data.dataset, self.collate or collate, self.rows, answers, seed=self.rule.seed)  # pyright: ignore[reportArgumentType]
        self._note(f"{in_one_line(answers, scores.dropped, len(scores))}; {self._path} names them")
        summary = {"step": 0, "epoch": 0, "head_start": None, "not_ready": None, "noise": None, "gate": None}
        self.looks.append({**summary, "rows": len(scores), "kept": int(scores.kept.sum())})
        self._save(scores)
        self.data.plan = data.plan.scored(scores, 0, by=self.name)


def read_in_order(loader: Any, data: QualitySubset) -> None:
    """Make a loader read the rows in the draw's order.  Raises SettingsError for one that mixes them for good."""
    if isinstance(loader, DataLoaderShard | DataLoaderDispatcher):
        loader.set_sampler(SequentialSampler(data))
        return
    batches = inner_batch_sampler(loader.batch_sampler)
    sampler = getattr(batches, "sampler", batches)
    if not isinstance(sampler, SequentialSampler):
        raise SettingsError(
            f"the Trainer's own get_train_dataloader mixes the rows ({type(sampler).__name__}), and trusted rows have "
            "their place in an epoch; return a DataLoader without shuffle, or leave the method out and set "
            "train_sampling_strategy to 'sequential'"
        )


def stops_early(state: TrainerState) -> bool:
    """Whether the Trainer has an EarlyStoppingCallback."""
    return "EarlyStoppingCallback" in (state.stateful_callbacks or ())


def first_scores(path: Path) -> Path:
    """File of the first look's scores, once a second look has others."""
    return path.with_name(f"{path.stem}-1{path.suffix}")
