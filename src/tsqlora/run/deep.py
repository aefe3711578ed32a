"""`tsqlora audit --deep`: fine-tune in folds, for wrong labels that frozen features do not show."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tsqlora.compat.shapes import Float
from tsqlora.data.prepare import Prepared
from tsqlora.progress import Progress, Pulse
from tsqlora.run.callbacks import build_callbacks
from tsqlora.run.config import Config
from tsqlora.run.fit import arguments, predictor_of
from tsqlora.run.job import Job, load_model, trained_task, with_adapter
from tsqlora.training.fit import fit
from tsqlora.training.record import RunRecord

FOLDS = 3


def out_of_fold_logits(
    config: Config, data: Prepared, *, max_length: int, progress: Progress | None = None
) -> Float[np.ndarray, "n k"]:
    """Logits of every training row by a model that was fine-tuned, by the config, on the other folds.

    Cost: FOLDS trainings on two thirds of the rows. Nothing is saved.
    """
    rows, seed = data.samples["train"], config.training.seed
    enough = np.unique(rows.labels, return_counts=True)[1].min() >= FOLDS
    folds = (StratifiedKFold if enough else KFold)(FOLDS, shuffle=True, random_state=seed)
    parts: dict[int, np.ndarray] = {}
    for number, (train, test) in enumerate(folds.split(rows.labels, rows.labels), start=1):
        samples = {"train": rows.take(train), "validation": rows.take(test)}
        job = _job(config, replace(data, samples=samples), max_length)
        logits = _fine_tuned(job, _of_fold(number, progress))
        parts |= dict(zip(test.tolist(), logits, strict=True))
    return np.stack([parts[j] for j in range(len(rows))])


def _job(config: Config, data: Prepared, max_length: int) -> Job:
    task = trained_task(config)
    return Job(config, task, load_model(config, task, data.splits.labels), data, max_length)


def _fine_tuned(job: Job, progress: Progress | None) -> Float[np.ndarray, "m k"]:
    """Train on the job's training rows; return the logits of its validation rows."""
    with tempfile.TemporaryDirectory() as folder:
        args, model = arguments(job.config, Path(folder)), with_adapter(job.config, job.pretrained)
        args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        args.load_best_model_at_end = False
        record = RunRecord("running", args.seed, job.task.name, None, {"hash": job.data.hash}, {})
        method = build_callbacks(job, Path(folder) / "scores.parquet", progress)
        fit(model, args, method, job.inputs, record, progress=progress)
        return predictor_of(job, model, args).logits(
            job.data.samples["validation"].samples, phase="prediction", progress=progress
        )


def _of_fold(number: int, progress: Progress | None) -> Progress | None:
    """Name the fold in each phase."""
    if progress is None:
        return None

    def show(phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
        progress(f"fold {number} of {FOLDS}: {phase}", done, total, pulse)

    return show
