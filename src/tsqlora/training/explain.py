"""Explain why training rows were drawn, left out or suspected, from a run or a file of scores."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from tsqlora.auditing.draw.epochs import EpochPlan
from tsqlora.auditing.reasons import explain_row, place_of
from tsqlora.auditing.scores import Scores
from tsqlora.errors import DataError
from tsqlora.record import RunRecord, question_in_words
from tsqlora.run_dir import CONFIG_FILE, is_run
from tsqlora.settings import load_config
from tsqlora.training.quality_callback import SCORES_FILE, first_scores


def explain_source(source: Path, row: int, *, data: Path | None = None) -> dict[str, Any]:
    """The scores of a row, by its number in its file; for a run also the number of epochs that drew it.

    Raises DataError if there are no scores, or none of this row.
    """
    scores = scores_of(source)
    explained = explain_row(scores, row, data=data)
    if not (source.is_dir() and is_run(source)):
        return explained
    if explained["reason"] in ("trusted row", "held out"):
        explained["question"] = question_in_words(RunRecord.load(source).quality.get("question") or {})
    if (draws := draws_of(source, scores)) is None:
        return explained
    place = place_of(scores, row)
    return {**explained, "drawn": sum(bool((rows == place).any()) for rows in draws), "epochs": len(draws)}


def scores_of(source: Path) -> Scores:
    """The scores of a run or of a file."""
    path = source / SCORES_FILE if source.is_dir() else source
    if not path.exists() and source.is_dir():
        folder = quote(str(source))
        raise DataError(f"{source} has no {SCORES_FILE}; type `tsqlora score {folder} --out {folder}/{SCORES_FILE}`")
    return Scores.load(path)


def draws_of(run: Path, scores: Scores) -> list[np.ndarray] | None:
    """The rows in each epoch of a run, trusted ones behind the pool's; None for a run of a version without looks.

    `scores` are the run's last ones.
    """
    config, record = load_config(run / CONFIG_FILE, trained=True), RunRecord.load(run)
    quality = record.quality
    if "looks" not in quality:
        return None
    twins, question = scores.left_out_as("trusted row"), quality.get("question") or {}
    plan = EpochPlan(
        len(scores),
        config.quality.fraction,
        config.training.seed,
        trusted=quality["trusted_rows"],
        excluded=twins if twins.any() else None,
        contradicted=question.get("contradicted", False),
        awaits_scores=True,
    ).holding_out(scores)
    if "from" in question:
        epoch, place = question["from"]
        plan = replace(plan, asks=epoch * plan.size + place)
    plans, first = {0: plan}, first_scores(run / SCORES_FILE)
    for one in ([Scores.load(first)] if first.exists() else []) + [scores]:
        epoch = one.record.epoch or 0
        plans[epoch] = plan if one.record.not_ready else plan.scored(one, epoch)
    return [plans[max(e for e in plans if e <= epoch)].draw(epoch) for epoch in range(record.plan["epochs"])]
