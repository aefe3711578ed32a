"""One cell of a comparison, from a config to what it found."""

import hashlib
import json
import math
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from tsqlora.compare.cells import Cell
from tsqlora.compare.methods import POLICIES, Rows, build
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.progress import Progress
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.scores import Scores
from tsqlora.run.config import Config
from tsqlora.run.job import Job, arguments, fit_job, load, measure, require_drawable
from tsqlora.tasks.generation import Generation
from tsqlora.training.live import peak_memory
from tsqlora.training.predict import predict_logits
from tsqlora.training.quality_callback import SCORES_FILE, QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord
from tsqlora.training.write import token_metrics

Equal = Literal["steps", "epochs", "seconds"]
TRIAL_STEPS = range(4, 12)
"""Steps that are timed to find how many fit into given seconds."""


def run_cell(
    config: Config, cell: Cell, *, equal: Equal, seconds: float | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Trains and measures a cell in this process; what it found, ready for JSON.

    `seconds` is what it may take, None for as many steps as the config says. A training that fails, such
    as by diverging, is a result too: `failed` says how. Settings that are wrong raise, but where seconds gave too few
    steps for them: that is a result as well.
    """
    settings = settings_of(config, cell, {})
    found: dict[str, Any] = {"cell": cell.to_dict(), "equal": equal, "settings": settings.model_dump()}
    steps = 0
    failures = (TsqLoraError,) if seconds is None else (TsqLoraError, SettingsError)
    if seconds is not None:
        with _failure_in(found, failures):
            steps = steps_in(seconds, settings, cell)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        job = load(settings)
        if seconds is None:
            steps = planned_steps(settings, len(job.data.samples["train"]), cell, equal=equal)
        record = RunRecord("running", cell.seed, job.task.name, None, {"hash": job.data.hash}, {"steps": steps})
        if "failed" not in found:
            settings = settings_of(config, cell, {"max_steps": steps})
            with _failure_in(found, failures):
                found |= _train(settings, cell, job, record, Path(folder), progress)
    record.notes += sorted({str(w.message) for w in warned if w.filename.startswith(str(_PACKAGE))})
    return found | {
        "settings_hash": settings_hash(settings_of(config, cell, {}), cell, equal=equal, data=job.data.hash),
        "steps": steps,
        "metrics": record.metrics,
        "cost": {phase: asdict(cost) for phase, cost in record.cost.items()},
        "seconds": sum(cost.seconds for phase, cost in record.cost.items() if phase != "evaluation"),
        "peak_memory_bytes": peak_memory(),
        "data_hash": job.data.hash,
        "task": job.task.name,
        "notes": record.notes,
        "versions": record.versions,
        "commit": commit(),
    }


@contextmanager
def _failure_in(found: dict[str, Any], failures: tuple[type[TsqLoraError], ...]) -> Iterator[None]:
    """Notes how a training failed, such as by diverging."""
    try:
        yield
    except TsqLoraError as error:
        # The classes below it are of settings and data: nothing that another seed would cure.
        if type(error) not in failures:
            raise
        found["failed"] = str(error)


def settings_of(config: Config, cell: Cell, further: dict[str, Any]) -> Config:
    """The config with the cell's seed and learning rate, and further arguments of the Trainer; nothing is saved."""
    changes = {"seed": cell.seed, "learning_rate": cell.learning_rate, "save_strategy": "no", **further}
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def settings_hash(settings: Config, cell: Cell, *, equal: Equal, data: str) -> str:
    """SHA-256 of what decides a cell: its settings, method and policy, what is equal, and the hash of its rows.

    Where the files of rows lie is no part of it.
    """
    about = settings.model_dump(exclude={"data": {"train", "validation", "test"}})
    decides = {"settings": about, "cell": cell.to_dict(), "equal": equal, "data": data}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def planned_steps(config: Config, rows: int, cell: Cell, *, equal: Equal) -> int:
    """Optimizer steps: of the config's epochs of its fraction, or with equal epochs, of all rows for who has them."""
    share = 1.0 if cell.entry.policy == "all" and equal != "steps" else config.quality.fraction
    batches = math.ceil(draw_size(rows, share) / config.training.batch_size)
    window = int(config.training.further_arguments().get("gradient_accumulation_steps", 1))
    return math.ceil(batches / window) * config.training.epochs


def _train(
    settings: Config, cell: Cell, job: Job, record: RunRecord, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    args = arguments(settings, folder)
    rows = POLICIES[cell.entry.policy](job, folder / SCORES_FILE, progress)
    if rows.quality is not None:
        require_drawable(job, rows.quality)
    with record.timed("building"):
        set_seed(cell.seed)
        built, ranks = build(job, cell.entry.method, steps=args.max_steps)
    building = record.cost.pop("building")
    building.add(forward=built.cost.forward, backward=built.cost.backward, tokens=built.cost.tokens)
    fit_job(job, built.model, args, rows.data, record, rows.quality, ranks, progress, also=built.callbacks)
    record.cost = {"building": building} | record.cost
    measure(job, built.model, record, args, progress)
    return {
        "parameters": {"trainable": built.trainable()},
        "ranks": built.ranks(),
        "quality": _what_was_drawn(rows),
        "bf16": args.bf16,
    }


def _what_was_drawn(rows: Rows) -> dict[str, Any]:
    drawn: dict[str, Any] = {"rows": len(rows.data.dataset), "rows_an_epoch": len(rows.data)}
    if rows.quality is None:
        return drawn
    scores = rows.data.scores
    noise = None if scores is None else scores.record.get("noise")
    random = _why_at_random(rows.quality.refused, scores)
    return drawn | {"scored": scores is not None, "refused": rows.quality.refused, "random": random, "noise": noise}


def _why_at_random(refused: str | None, scores: Scores | None) -> str | None:
    """Why a policy that scores drew as a random one does all the same; None where its scores decided."""
    if scores is None:
        return refused or "rows were never scored"
    guard = scores.record.get("guard", {})
    if guard.get("passed") is False:
        return str(guard["why"])
    return "no row was left out, and rows are drawn evenly" if scores.even and scores.kept.all() else None


# ------------------------------------------------------------------------------- equal seconds


def steps_in(seconds: float, settings: Config, cell: Cell) -> int:
    """How many steps a cell can take in so many seconds, by a trial of a few and of its scoring."""
    job = load(settings)
    whole = planned_steps(settings, len(job.data.samples["train"]), cell, equal="epochs")
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(settings_of(settings, cell, {"max_steps": whole}), Path(folder))
        begun = time.perf_counter()
        set_seed(cell.seed)
        built, ranks = build(job, cell.entry.method, steps=whole)
        building = time.perf_counter() - begun
        rows = POLICIES[cell.entry.policy](job, Path(folder) / SCORES_FILE, None)
        record = RunRecord("trial", cell.seed, job.task.name, None, {}, {})
        also = (*built.callbacks, clock)
        try:
            fit_job(job, built.model, args, rows.data, record, None, ranks, None, also=also)
        except _TrialOver:
            pass
        else:
            raise SettingsError(f"{cell.name}: {whole} steps are too few for a trial; use --equal steps")
        scoring = 0.0 if rows.quality is None else _scoring_seconds(job, built.model, args, rows.quality, ranks)
    left = seconds - building - scoring
    steps = int(left / clock.seconds_a_step)
    if steps < 1:
        raise SettingsError(f"{cell.name}: no step fits into {seconds:.0f} s after building and scoring")
    return steps


class _TrialOver(Exception):
    """Ends a trial before anything is missed that a whole run would do."""


class _Clock(TrainerCallback):
    """Times the steps of a trial, and ends it."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.seconds_a_step = math.inf

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == TRIAL_STEPS.start:
            self.begun = time.perf_counter()
        if state.global_step == TRIAL_STEPS.stop:
            self.seconds_a_step = (time.perf_counter() - self.begun) / len(TRIAL_STEPS)
            raise _TrialOver


def _scoring_seconds(
    job: Job, model: torch.nn.Module, args: TrainingArguments, quality: QualityCallback, ranks: RankCallback | None
) -> float:
    """By a few batches forward: a pass of logits alone, or about three with gradients, four with look-ahead.

    Three also over the rows from which the first ranks come.
    """
    samples = job.data.samples["train"]
    few = samples.samples[:: max(1, len(samples) // (4 * args.train_batch_size))]
    begun = time.perf_counter()
    autocast = torch.bfloat16 if args.bf16 else None
    how = {"batch_size": args.train_batch_size, "autocast": autocast}
    if isinstance(job.task, Generation):
        token_metrics(model, few, job.collate, job.task, **how)
    else:
        predict_logits(model, few, job.collate, **how)
    a_row = (time.perf_counter() - begun) / len(few)
    terms = quality.terms.values()
    passes = 1 + 2 * any(term.gradient for term in terms) + any(term.lookahead for term in terms)
    probed = 0 if ranks is None else min(ranks.samples, len(quality.data))
    return a_row * (passes * len(samples) + 3 * probed)


# ------------------------------------------------------------------------------------- origin

_PACKAGE = Path(__file__).parents[1]


@cache
def commit() -> str | None:
    """Of the code that is imported: as it was when first asked, which `preload` does, hours before the last cell."""
    return commit_of(_PACKAGE)


def commit_of(package: Path) -> str | None:
    """The commit of a source checkout, with "-dirty" where the package differs from it; None for an installed one."""

    def asked(*words: str) -> str:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True).stdout

    try:
        # Or git would tell of the project around a virtual environment.
        asked("ls-files", "--error-unmatch", "cli.py")
        return asked("rev-parse", "HEAD").strip() + ("-dirty" if asked("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
