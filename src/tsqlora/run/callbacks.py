"""Build the callbacks that a config describes, and the rows that they draw from."""

from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.table import Samples
from tsqlora.progress import Progress
from tsqlora.quality.rows import REVIEWED_AS
from tsqlora.quality.rule import RowNames, ScoringRule, require_terms
from tsqlora.quality.sampling import stratum_sizes
from tsqlora.quality.subset import QualitySubset
from tsqlora.run.config import PRESETS, Config
from tsqlora.run.job import Job, published
from tsqlora.tasks import has_own_loss
from tsqlora.training.fit import Method
from tsqlora.training.quality_callback import QualityCallback


def subset(job: Job, fraction: float) -> QualitySubset:
    """The training rows, with this share of them in an epoch."""
    samples, training = job.train.samples, job.config.training
    data = QualitySubset(
        samples,
        fraction,
        training.seed,
        trusted=trusted_of(job),
        lengths=samples.lengths,
        batch_size=training.batch_size,
    )
    if "trusted" in job.data:
        marks = {row.id: row.cells.get(REVIEWED_AS) == "suspect" for row in job.data["trusted"]}
        data.suspects = np.array([marks.get(int(id), False) for id in job.data["trusted"].samples.ids], dtype=np.bool_)
    return data


def scoring_rule(config: Config) -> ScoringRule:
    """How rows are scored and drawn."""
    q = config.quality
    return ScoringRule(
        weights=PRESETS[q.preset],
        judge=q.preset != "paper",
        seed=config.training.seed,
        head_start=q.head_start,
        select=q.enabled,
    )


def trusted_of(job: Job) -> Samples | None:
    """The rows of data.trusted."""
    return job.data["trusted"].samples if "trusted" in job.data else None


def row_names(job: Job, **about: Any) -> RowNames:
    """The training rows' ids, hashes and lengths, and their source."""
    samples = job.train.samples
    return RowNames(samples.ids, samples.hashes, samples.lengths, {**job.scored_rows, **about})


def quality_callback(
    job: Job, data: QualitySubset, scores_path: Path, progress: Progress | None, *, look: Path | None = None
) -> QualityCallback:
    """The QualityCallback of the config, with a look in a folder.

    Raises SettingsError or UnsupportedError for terms that the task lacks, and for a draw that is too small.
    """
    rule = scoring_rule(job.config)
    if rule.weights is not None and rule.select:
        require_terms(rule.weights, job.task)
        if job.task.reading.judges():
            stratum_sizes(np.unique(job.train.samples.labels, return_counts=True)[1], len(data))
    return QualityCallback(
        data,
        rule=rule,
        rows=row_names(job),
        scores_path=scores_path,
        progress=progress,
        collate=job.collate,
        look=look if rule.select or rule.head_start else None,
        task=job.task if has_own_loss(job.task, job.pretrained.model) else None,
    )


def rank_callback(job: Job) -> Any:
    """The RankCallback that the config describes; None where ranks stay."""
    r, seed = job.config.ranks, job.config.training.seed
    return published().RankCallback(r.interval, min_rank=r.min, seed=seed, collate=job.collate) if r.moves else None


def build_callbacks(
    job: Job, scores_path: Path, progress: Progress | None = None, *, look: Path | None = None
) -> Method:
    """The QualitySubset, QualityCallback and RankCallback that the config describes, with a look in a folder."""
    data = subset(job, job.config.quality.fraction)
    return Method(data, quality_callback(job, data, scores_path, progress, look=look), rank_callback(job))
