"""`tsqlora audit --deep`: fine-tune in folds, for wrong labels that frozen features do not show."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tsqlora.compat.shapes import Float
from tsqlora.data.table import Table, data_hash
from tsqlora.oom import even_parts, retry_on_oom
from tsqlora.progress import Progress, Pulse
from tsqlora.run.callbacks import build_callbacks
from tsqlora.run.config import Config
from tsqlora.run.fit import arguments, predictor_of
from tsqlora.run.job import Job, load_model, trained_task, with_adapter
from tsqlora.training.fit import fit
from tsqlora.training.record import RunRecord

FOLDS = 3


def out_of_fold_logits(
    config: Config, table: Table, *, max_length: int, progress: Progress | None = None
) -> Float[np.ndarray, "n k"]:
    """Logits of every training row by a model that was fine-tuned, by the config, on the other folds.

    Cost: FOLDS trainings on two thirds of the rows. Nothing is saved. A fold that runs out of memory starts again with
    its batches in smaller parts.
    """
    rows, sizes = table.samples, even_parts(config.training.batch_size)
    enough = np.unique(rows.labels, return_counts=True)[1].min() >= FOLDS
    folds = (StratifiedKFold if enough else KFold)(FOLDS, shuffle=True, random_state=0)
    parts: dict[int, np.ndarray] = {}
    for number, (train, test) in enumerate(folds.split(rows.labels, rows.labels), start=1):
        parts_of = {"train": rows.take(train), "validation": rows.take(test)}
        data = {name: replace(table, samples=part, ids=part.ids) for name, part in parts_of.items()}
        attempt = partial(_attempt, config, data, max_length, _of_fold(number, progress))
        size, logits = retry_on_oom(attempt, sizes)
        sizes = sizes[sizes.index(size) :]
        parts |= dict(zip(test.tolist(), logits, strict=True))
    return np.stack([parts[j] for j in range(len(rows))])


def _attempt(
    config: Config, data: Mapping[str, Table], max_length: int, progress: Progress | None, size: int
) -> tuple[int, Float[np.ndarray, "m k"]]:
    task = trained_task(config)
    job = Job(config, task, load_model(config, task, data["train"].classes), data, max_length)
    return size, _fine_tuned(job, size, progress)


def _fine_tuned(job: Job, size: int, progress: Progress | None) -> Float[np.ndarray, "m k"]:
    """Train on the job's training rows, at most `size` at once; return the logits of its validation rows."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(job.config, Path(folder), micro_batch_size=size)
        model = with_adapter(job.config, job.pretrained)
        args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        args.load_best_model_at_end = False
        record = RunRecord("running", args.seed, job.task.name, None, {"hash": data_hash(job.data)}, {})
        method = build_callbacks(job, Path(folder) / "scores.parquet", progress)
        fit(model, args, method, job.inputs, record, progress=progress)
        return predictor_of(job, model, args).logits(
            job.data["validation"].samples, phase="prediction", progress=progress
        )


def _of_fold(number: int, progress: Progress | None) -> Progress | None:
    """Name the fold in each phase."""
    if progress is None:
        return None

    def show(phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
        progress(f"fold {number} of {FOLDS}: {phase}", done, total, pulse)

    return show
