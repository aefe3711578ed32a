"""Scores for any trainer: rows of any size, to a config's model or by a run's weights, resumable."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tsqlora import distributed
from tsqlora.data.rows import open_split
from tsqlora.data.splits import Splits, whole
from tsqlora.data.write import require_apart, require_place
from tsqlora.errors import SettingsError
from tsqlora.progress import Progress
from tsqlora.quality.drop import drop_rows, require_drops
from tsqlora.quality.rule import PAPER_TERMS
from tsqlora.quality.score import Compute, score
from tsqlora.quality.scores import Scores
from tsqlora.run.callbacks import row_names, scoring_rule, trusted_of
from tsqlora.run.config import load_config
from tsqlora.run.finished import FinishedRun, device_of, open_run
from tsqlora.run.job import Job, load, read_with_model, require_scoring, with_slots
from tsqlora.run.plan import scoring_plan
from tsqlora.run.reading import hints_of, read
from tsqlora.run.start import with_start
from tsqlora.training.run_dir import CONFIG_FILE, alone_in

WARM_UP_FILE = "theta.safetensors"


def score_rows(
    source: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Scores:
    """All terms of every training row: to the model that a config begins with, or by a run's weights.

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
            require_apart(out, config.data.train, config.data.trusted, config.data.validation, config.data.test)
            require_scoring(config)
            job = load(config, folder=tokens)
            model = with_slots(config, job.pretrained).to(device_of(config))
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
    plan = scoring_plan(config, task, model, rows=rows, max_length=length)
    return {"rows": rows, "held_out": splits.held_out, "files": splits.dialects, **plan}


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
        finally:
            shutil.rmtree(tokens, ignore_errors=True)


def _splits(source: Path, run: FinishedRun) -> Splits:
    """Of the run's own rows as its training split them; of another file whole, by the run's columns and classes."""
    path = run.config.data.train
    if path == load_config(source / CONFIG_FILE, trained=True).data.train:
        return replace(read(run.config), labels=run.labels)
    file = open_split(path, split="train", hints=hints_of(run.config))
    run.require_columns(file.columns(), file.name, labelled=True)
    return whole("train", file, run.columns, run.labels, run.format, run.config.data.max_bad_rows)


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
        trusted=trusted_of(job),
    )
