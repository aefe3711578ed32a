"""Scores for any trainer: rows of any size, from a config's warm-up or a run's weights, resumable."""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.data.generation import left_out
from tsqlora.data.prepare import Prepared, prepare
from tsqlora.data.rows import open_split
from tsqlora.data.splits import Splits, whole
from tsqlora.data.write import require_apart, require_place
from tsqlora.errors import NotLearnedError, SettingsError
from tsqlora.progress import Progress
from tsqlora.quality.asked import PAPER_TERMS, require_terms
from tsqlora.quality.drop import drop_rows, require_drops
from tsqlora.quality.journal import bind, write_tensors
from tsqlora.quality.rows import reference_indices
from tsqlora.quality.scorable import require_scorable
from tsqlora.quality.score import learned_on, score
from tsqlora.quality.scores import Scores
from tsqlora.quality.subset import QualitySubset
from tsqlora.run import reading
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.run.job import (
    NOTHING_TO_SCORE,
    Job,
    about_rows,
    arguments,
    begin,
    fit_job,
    load_model,
    with_slots,
)
from tsqlora.run.plan import scoring_plan, warmup_epochs
from tsqlora.run.predict import Trained, device_of, open_run
from tsqlora.run.start import with_start
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.forward import Collate
from tsqlora.training.checkpoints import last_checkpoint
from tsqlora.training.run_dir import CHECKPOINT_DIR, CONFIG_FILE, LOCK_FILE, alone_in

WARM_UP_FILE = "theta.safetensors"


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that has learned something, and the rows that it is to score."""

    config: Config
    task: Task
    model: nn.Module
    collate: Collate
    data: Prepared


def score_rows(
    source: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Scores:
    """All terms of every training row: after a config's warm-up, or by a run's weights.

    Without data.validation, what a training would hold out of data.train is held out here, too (`held_out` in the
    scores' record); of a run and another file in data.train every row is scored.
    Rows are read in chunks, and samples are kept on disk. What is done is kept in OUT.partial
    until the scores are written: the same call after a kill goes on from there, and gives the
    same file. Rows of the kinds in `drop` are never drawn from the scores. Raises SettingsError
    where OUT.partial is of another scoring, or another process is at it.
    """
    if (processes := distributed.launched()) > 1:
        raise SettingsError(
            f"scoring was started as {processes} processes, and one keeps what is done; start it as one, or train with "
            "quality.enabled, which shares the scoring"
        )
    require_drops(drop)
    require_place(out)
    with _partial(out) as (partial, tokens):
        if source.is_dir():
            ready = _run(source, overrides, tokens)
            require_apart(out, ready.config.data.train)
        else:
            config = with_start(load_config(source, overrides))
            require_apart(out, config.data.train, config.data.validation, config.data.test)
            ready = warmed_up(config, partial / "warm-up", tokens, progress)
        scores = score_ready(ready, partial / "scoring", progress)
        scores = drop_rows(scores, drop, lambda: ready.data.splits.texts("train"), tokens / "signatures")
        scores.save(out)
    return scores


def plan_scoring(source: Path, *, overrides: Sequence[str] = (), drop: Sequence[str] = ()) -> dict[str, Any]:
    """What `score_rows` would do; every row is read and its label checked, nothing is written."""
    require_drops(drop)
    if source.is_dir():
        run = open_run(source, overrides)
        config, model, length = run.config, run.model, run.max_length
        splits = _splits(source, run)
    else:
        config = _enabled(with_start(load_config(source, overrides)))
        splits = reading.read(config)
        pretrained, length = load_model(config, splits.labels)
        model = with_slots(config, pretrained)
    rows = len(splits.places["train"])
    plan = scoring_plan(config, model, rows=rows, max_length=length, warmup=not source.is_dir())
    return {"rows": rows, "held_out": splits.held_out, **plan}


@contextmanager
def _partial(out: Path) -> Iterator[tuple[Path, Path]]:
    """OUT.partial, gone once all is done; and a folder in it for samples, which never stays."""
    partial = Path(f"{out}.partial")
    tokens = partial / "tokens"
    with alone_in(partial, busy=f"another process is scoring into {out}; wait for it, or name another --out"):
        shutil.rmtree(tokens, ignore_errors=True)
        tokens.mkdir()
        try:
            yield partial, tokens
            shutil.rmtree(partial)
        except NotLearnedError:
            # To go on would end here again.
            shutil.rmtree(partial)
            raise
        finally:
            shutil.rmtree(tokens, ignore_errors=True)
            if partial.exists() and [path.name for path in partial.iterdir()] == [LOCK_FILE]:
                shutil.rmtree(partial)


def _run(source: Path, overrides: Sequence[str], tokens: Path) -> Ready:
    run = open_run(source, overrides)
    data = prepare(_splits(source, run), run.tokenizer, max_length=run.max_length, writing=run.writing, folder=tokens)
    _tell_left_out(data)
    return Ready(run.config, reading.trained_task(run.config), run.model, run.collate, data)


def _splits(source: Path, run: Trained) -> Splits:
    """Of the run's own rows as its training split them; of another file whole, by the run's columns and classes."""
    path = run.config.data.train
    if path == load_config(source / CONFIG_FILE).data.train:
        return replace(reading.read(run.config), labels=run.labels)
    file = open_split(path, split="train")
    run.require_columns(file.columns(), file.name, labelled=True)
    return whole("train", file, run.columns, run.labels, run.format)


def _tell_left_out(data: Prepared) -> None:
    for split in data.samples.values():
        if note := left_out(split):
            warnings.warn(note, stacklevel=2)


def warmed_up(config: Config, folder: Path, tokens: Path, progress: Progress | None) -> Ready:
    """Trains the warm-up, unless the folder has what came of it.

    It begins anew at the last epoch that was finished. The weights are always those of the
    folder's file, in a model that was never trained: so a scoring that was cut off has the same.
    """
    splits = reading.read(_enabled(config))
    pretrained, length = load_model(config, splits.labels)
    writing = reading.writing_of(config)
    data = prepare(splits, pretrained.tokenizer, max_length=length, writing=writing, folder=tokens)
    _tell_left_out(data)
    job = Job(config, reading.trained_task(config), pretrained, data, length)
    bind(folder, {"rows": data.hash, "settings": dump_config(config), "torch": torch.__version__})
    theta = folder / WARM_UP_FILE
    if not theta.exists():
        write_tensors(theta, _trainable(_train(job, folder, progress)))
        pretrained, _ = load_model(config, splits.labels)
    model = with_slots(config, pretrained)
    with torch.no_grad():
        for name, value in load_file(theta).items():
            model.get_parameter(name).copy_(value)
    return Ready(config, job.task, model.to(device_of(config)), job.collate, data)


def _train(job: Job, folder: Path, progress: Progress | None) -> nn.Module:
    """Random draws until the model has learned something.  Raises NotLearnedError if it does not."""
    config = job.config
    args = arguments(config, folder)
    model, record = begin(job, args)
    samples, q, seed = job.data.samples["train"], config.quality, config.training.seed
    data = QualitySubset(samples, q.fraction, seed, lengths=samples.lengths, batch_size=config.training.batch_size)
    data.plan = data.plan.unscored(awaits_scores=True)
    reference = [samples[row] for row in reference_indices(len(samples), q.reference, seed)]
    require_scorable(
        model,
        reference[:2],
        job.collate,
        task=job.task,
        weights=q.resolved_weights(),
        reject=q.resolved_reject(),
        scope=q.scope,
    )
    stop, checkpoints = StopOnceLearned(job, data, reference), folder / CHECKPOINT_DIR
    resume_from = last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    fit_job(job, model, args, data, record, None, None, progress, also=[stop], resume_from=resume_from)
    return model


class StopOnceLearned(TrainerCallback):
    """Ends a warm-up after the first epoch, of those from which it may, that leaves the model above chance.

    As QualityCallback counts them: `warmup` passes over all rows at least, at most `warmup_limit`
    of the run's epochs. Then NotLearnedError.
    """

    def __init__(self, job: Job, data: QualitySubset, reference: Sequence[Any]) -> None:
        self.job, self.data, self.reference = job, data, reference

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        q, epochs = self.job.config.quality, round(state.epoch or 0)
        if epochs < warmup_epochs(q.warmup, rows=len(self.data.dataset), size=len(self.data)):
            return
        test = learned_on(
            kwargs["model"],
            self.reference,
            self.job.collate,
            task=self.job.task,
            batch_size=args.per_device_train_batch_size,
        )
        if test.passed:
            control.should_training_stop = True
            # The weights are kept otherwise, and a checkpoint from here would go on training.
            control.should_save = False
        elif epochs >= min(q.warmup_limit * state.num_train_epochs, state.num_train_epochs - 1):
            test.require()


def score_ready(ready: Ready, journal: Path | None = None, progress: Progress | None = None) -> Scores:
    """Every training row's scores; with a journal they are resumable."""
    q, seed, samples = ready.config.quality, ready.config.training.seed, ready.data.samples["train"]
    return score(
        ready.model,
        samples,
        ready.collate,
        reference=reference_indices(len(samples), q.reference, seed),
        task=ready.task,
        weights=q.resolved_weights(),
        temperature=q.resolved_temperature(),
        reject=q.resolved_reject(),
        terms=PAPER_TERMS,
        scope=q.scope,
        calibration=q.calibrate,
        batch_size=ready.config.training.batch_size,
        seed=seed,
        hashes=samples.hashes,
        ids=samples.ids,
        lengths=samples.lengths,
        record={**about_rows(ready.config, ready.data), "held_out": ready.data.splits.held_out},
        journal=journal,
        progress=progress,
    )


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _enabled(config: Config) -> Config:
    if not config.quality.enabled:
        raise SettingsError(NOTHING_TO_SCORE)
    reading.require_of_task(config)
    require_terms(config.quality.resolved_weights() or {}, get_task(config.task.type))
    return config
