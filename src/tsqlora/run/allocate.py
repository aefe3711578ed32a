"""Ranks alone, for any trainer: by a config's warm-up or a run's weights."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.errors import DataError, NotLearnedError, SettingsError
from tsqlora.interop.patterns import lora_config
from tsqlora.layer_sensitivity import sensitivity, sensitivity_rows
from tsqlora.progress import Progress
from tsqlora.quality.epochs import EpochPlan
from tsqlora.quality.scores import Scores
from tsqlora.quality.subset import QualitySubset
from tsqlora.ranks.allocate import allocate
from tsqlora.run.config import load_config
from tsqlora.run.job import NOTHING_TO_SCORE, Job, arguments, begin, fit_job, load, method
from tsqlora.run.predict import Trained, open_run
from tsqlora.run.reading import read, trained_task
from tsqlora.run.start import with_start
from tsqlora.training.quality_callback import SCORES_FILE, QualityCallback
from tsqlora.training.rank_callback import RankCallback


def allocate_ranks(source: Path, *, overrides: Sequence[str] = (), progress: Progress | None = None) -> dict[str, Any]:
    """LoraConfig's arguments with the ranks that the quality sample asks for."""
    if source.is_dir():
        run = open_run(source, overrides)
        config, chosen = run.config, ranks_of(run, source / SCORES_FILE)
    else:
        config = with_start(load_config(source, overrides))
        with tempfile.TemporaryDirectory() as folder:
            ranks = warm_up(load(config), progress, scores_path=Path(folder) / SCORES_FILE)
        chosen = ranks.events[0].ranks
    return lora_config(chosen, config.adapter.alpha / config.ranks.mean)


def ranks_of(run: Trained, scores_path: Path) -> dict[str, int]:
    """Ranks by the sensitivities of a trained run, on its quality sample, or at random if unscored.

    Raises DataError if the scores are not those of the run's rows.
    """
    r, seed = run.config.ranks, run.config.training.seed
    samples = run.prepare(read(run.config)).samples["train"]
    rows = np.arange(len(samples))
    if scores_path.exists():
        scores = Scores.load(scores_path)
        if scores.hashes != samples.hashes:
            raise DataError(f"{scores_path} has scores of other rows than {run.config.data.train} has now; train anew")
        epoch = int(scores.record.get("epoch", 0))
        plan = EpochPlan(len(scores), run.config.quality.fraction, seed, scores=scores, scored_epoch=epoch)
        rows = np.unique(plan.draw(epoch))  # where few are kept an epoch repeats them
    rows = rows[sensitivity_rows(len(rows), r.samples, seed)]
    measured = sensitivity(
        run.model,
        [samples[row] for row in rows.tolist()],
        run.collate,
        estimator=r.estimator,
        task=trained_task(run.config),
        batch_size=run.config.training.batch_size,
    )
    return allocate(measured, mean_rank=r.mean, min_rank=r.min, max_rank=r.resolved_max(), gamma=r.gamma)


def warm_up(job: Job, progress: Progress | None, *, scores_path: Path) -> RankCallback:
    """Trains only until the rows are scored and the first ranks are decided.

    Raises NotLearnedError if the model is still at chance when the config gives up.
    """
    if not job.config.quality.enabled:
        raise SettingsError(NOTHING_TO_SCORE)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(job.config, Path(folder))
        model, record = begin(job, args)
        data, quality, ranks = method(job, scores_path, progress)
        assert quality is not None
        fit_job(job, model, args, data, record, quality, ranks, progress, also=[StopOnceScored(data, quality)])
    return ranks


class StopOnceScored(TrainerCallback):
    """Ends the training at the first step after scoring; NotLearnedError where scoring was refused."""

    def __init__(self, data: QualitySubset, quality: QualityCallback) -> None:
        self.data, self.quality = data, quality

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.quality.refused is not None:
            raise NotLearnedError(self.quality.refused)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = False
        control.should_training_stop = not self.data.plan.awaits_scores

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = False
