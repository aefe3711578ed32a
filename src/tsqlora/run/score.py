"""Scores for any trainer: rows of any size, after a config's warm-up or by a run's weights, resumable."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.data.rows import open_split
from tsqlora.data.splits import Splits, whole
from tsqlora.data.write import require_apart, require_place
from tsqlora.errors import NotLearnedError, SettingsError
from tsqlora.progress import Progress
from tsqlora.quality.drop import drop_rows, require_drops
from tsqlora.quality.journal import bind, write_tensors
from tsqlora.quality.rows import REFERENCE_ROWS, reference_indices
from tsqlora.quality.rule import PAPER_TERMS
from tsqlora.quality.scorable import require_scorable
from tsqlora.quality.score import Compute, learned_on, score
from tsqlora.quality.scores import Scores
from tsqlora.run.callbacks import build_callbacks, row_names, scoring_rule
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.run.finished import FinishedRun, device_of, open_run
from tsqlora.run.fit import arguments, begin
from tsqlora.run.job import Job, load, load_model, read_with_model, require_scoring, with_slots
from tsqlora.run.plan import scoring_plan
from tsqlora.run.reading import read
from tsqlora.run.start import with_start
from tsqlora.training.checkpoints import last_checkpoint
from tsqlora.training.fit import Method, fit
from tsqlora.training.quality_callback import WARMUP_LIMIT, QualityCallback
from tsqlora.training.run_dir import CHECKPOINT_DIR, CONFIG_FILE, LOCK_FILE, alone_in

WARM_UP_FILE = "theta.safetensors"


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
            run = open_run(source, overrides)
            require_apart(out, run.config.data.train)
            job, model = run.job(_splits(source, run), folder=tokens), run.model
        else:
            config = with_start(load_config(source, overrides))
            require_apart(out, config.data.train, config.data.validation, config.data.test)
            job, model = warmed_up(config, partial / "warm-up", tokens, progress)
        scores = score_job(job, model, partial / "scoring", progress)
        scores = drop_rows(scores, drop, lambda: job.data.splits.texts("train"), tokens / "signatures")
        scores.save(out)
    return scores


def plan_scoring(source: Path, *, overrides: Sequence[str] = (), drop: Sequence[str] = ()) -> dict[str, Any]:
    """What `score_rows` would do; every row is read and its label checked, nothing is written."""
    require_drops(drop)
    if source.is_dir():
        run = open_run(source, overrides)
        config, task, model, length = run.config, run.predictor.task, run.model, run.max_length
        splits = _splits(source, run)
    else:
        config = with_start(load_config(source, overrides))
        require_scoring(config)
        task, splits, pretrained, length = read_with_model(config)
        model = with_slots(config, pretrained)
    rows = len(splits.places["train"])
    plan = scoring_plan(config, task, model, rows=rows, max_length=length, warmup=not source.is_dir())
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


def _splits(source: Path, run: FinishedRun) -> Splits:
    """Of the run's own rows as its training split them; of another file whole, by the run's columns and classes."""
    path = run.config.data.train
    if path == load_config(source / CONFIG_FILE, trained=True).data.train:
        return replace(read(run.config), labels=run.labels)
    file = open_split(path, split="train")
    run.require_columns(file.columns(), file.name, labelled=True)
    return whole("train", file, run.columns, run.labels, run.format)


def warmed_up(config: Config, folder: Path, tokens: Path, progress: Progress | None) -> tuple[Job, nn.Module]:
    """The job and its model after the warm-up, which is trained unless the folder has what came of it.

    It begins again at the last epoch that was finished. The weights are always those of the
    folder's file, in a model that was never trained: so a scoring that was cut off has the same.
    """
    require_scoring(config)
    job = load(config, folder=tokens)
    bind(folder, {"rows": job.data.hash, "settings": dump_config(config), "torch": torch.__version__})
    theta = folder / WARM_UP_FILE
    if not theta.exists():
        write_tensors(theta, _trainable(_train(job, folder, progress)))
        job = replace(job, pretrained=load_model(config, job.task, job.data.splits.labels))
    model = with_slots(config, job.pretrained)
    with torch.no_grad():
        for name, value in load_file(theta).items():
            model.get_parameter(name).copy_(value)
    return job, model.to(device_of(config))


def _train(job: Job, folder: Path, progress: Progress | None) -> nn.Module:
    """Random draws until the model has learned something.  Raises NotLearnedError if it does not."""
    args = arguments(job.config, folder)
    method = build_callbacks(job, folder / "scores.parquet", progress)
    data, quality = method.data, method.quality
    assert quality is not None
    model, record = begin(job, args, method)
    data.plan = data.plan.unscored(awaits_scores=True)
    samples = job.data.samples["train"]
    reference = [samples[j] for j in reference_indices(len(samples), REFERENCE_ROWS, job.config.training.seed)]
    require_scorable(model, reference[:2], job.collate, task=job.task, rule=quality.rule)
    stop, checkpoints = StopOnceLearned(job, quality, reference), folder / CHECKPOINT_DIR
    resume_from = last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    fit(model, args, Method(data), job.inputs, record, also=[stop], resume_from=resume_from, progress=progress)
    return model


class StopOnceLearned(TrainerCallback):
    """Ends a warm-up after the first epoch, of those from which it may, that leaves the model above chance.

    As QualityCallback counts them: `warmup` passes over all rows at least, at most half
    of the run's epochs. Then NotLearnedError.
    """

    def __init__(self, job: Job, quality: QualityCallback, reference: Sequence[Any]) -> None:
        self.job, self.quality, self.reference = job, quality, reference

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epochs = round(state.epoch or 0)
        if epochs < self.quality.warmup_epochs:
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
        elif epochs >= min(WARMUP_LIMIT * state.num_train_epochs, state.num_train_epochs - 1):
            test.require()


def score_job(job: Job, model: nn.Module, journal: Path | None = None, progress: Progress | None = None) -> Scores:
    """Every training row's scores; with a journal they are resumable."""
    return score(
        model,
        job.data.samples["train"],
        job.collate,
        rule=replace(scoring_rule(job.config), terms=PAPER_TERMS),
        task=job.task,
        rows=row_names(job, held_out=job.data.splits.held_out),
        compute=Compute(job.config.training.batch_size, journal=journal, progress=progress),
    )


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
