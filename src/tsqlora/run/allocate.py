"""Allocate ranks for any trainer: before the first step of a config's training, or with a run's weights."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.adapter.slots import active_ranks
from tsqlora.errors import DataError
from tsqlora.interop.patterns import lora_config
from tsqlora.layer_sensitivity import sensitivity, sensitivity_rows
from tsqlora.progress import Progress
from tsqlora.quality.epochs import EpochPlan
from tsqlora.quality.scores import Scores
from tsqlora.ranks.allocate import Sensitivity, allocate, costs, used
from tsqlora.run.callbacks import build_callbacks, moving
from tsqlora.run.config import load_config
from tsqlora.run.finished import FinishedRun, open_run
from tsqlora.run.fit import arguments, begin
from tsqlora.run.job import Job, load, read, require_scoring, with_adapter
from tsqlora.run.start import with_start
from tsqlora.training.fit import fit
from tsqlora.training.quality_callback import SCORES_FILE
from tsqlora.training.rank_callback import MOST_ROWS
from tsqlora.training.run_dir import CONFIG_FILE


def allocate_ranks(source: Path, *, overrides: Sequence[str] = (), progress: Progress | None = None) -> dict[str, Any]:
    """LoraConfig's arguments, with ranks by the layers' sensitivities on the drawn rows."""
    if source.is_dir():
        run = open_run(source, overrides)
        config, ranks = run.config, _ranks_of(run, source / SCORES_FILE)
    else:
        config = with_start(load_config(source, overrides))
        require_scoring(config)
        ranks = _first_ranks(load(moving(config)), progress)
    return lora_config(ranks, config.adapter.alpha / config.ranks.mean)


def _ranks_of(run: FinishedRun, scores_path: Path) -> dict[str, int]:
    """Ranks by a trained run's sensitivities, on the rows that its scores draw, or on all.

    Raises DataError if the scores belong to other rows.
    """
    r, model = run.config.ranks, run.model
    job = run.job(read(run.config, labels=run.record.labels))
    samples = job.train.samples
    rows = np.arange(len(samples))
    if scores_path.exists():
        scores = Scores.load(scores_path)
        if scores.hashes != samples.hashes:
            raise DataError(f"{scores_path} has scores of other rows than {run.config.data.train} has now; train again")
        fraction, epoch = run.config.quality.fraction, scores.record.epoch or 0
        plan = EpochPlan(len(scores), fraction, run.config.training.seed, scores=scores, scored_epoch=epoch)
        rows = np.unique(plan.draw(epoch))  # an epoch repeats rows if few remain
    measured = sensitivities(job, model, rows)
    mean = r.mean
    if r.depth != "all":  # the layers have the budget of those below them, too
        own = load_config(scores_path.parent / CONFIG_FILE, trained=True).ranks.mean
        mean *= used(active_ranks(model), measured.shapes) / sum(costs(measured.shapes).values()) / own
    return dict(allocate(measured, mean_rank=mean, min_rank=r.min, max_rank=r.max))


def sensitivities(job: Job, model: nn.Module, rows: np.ndarray) -> Sensitivity:
    """Layer sensitivities on as many of these training rows as RankCallback takes, drawn by the seed."""
    samples, training = job.train.samples, job.config.training
    chosen = sensitivity_rows(len(rows), MOST_ROWS, training.seed)
    return sensitivity(
        model,
        [samples[row] for row in rows[chosen].tolist()],
        job.collate,
        task=job.task,
        batch_size=training.batch_size,
    )


def _first_ranks(job: Job, progress: Progress | None) -> dict[str, int]:
    """The ranks that a training starts with."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(job.config, Path(folder))
        method = build_callbacks(job, Path(folder) / SCORES_FILE, progress)
        assert method.ranks is not None
        model = with_adapter(job.config, job.pretrained)
        record = begin(job, args, method, model)
        fit(model, args, method, job.inputs, record, also=[StopAtOnce()], progress=progress)
    return dict(method.ranks.events[0].ranks if method.ranks.events else method.ranks.final)


class StopAtOnce(TrainerCallback):
    """End the training after its first step: ranks are set before it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False
        control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = control.should_evaluate = False
