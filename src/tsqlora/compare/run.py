"""One cell of a comparison: trained, measured, and written as plain values."""

import hashlib
import json
import math
import tempfile
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from tsqlora import distributed
from tsqlora.compare.cells import Cell
from tsqlora.compare.methods import POLICIES, Rows, build
from tsqlora.compare.origin import PACKAGE, commit
from tsqlora.errors import TsqLoraError
from tsqlora.progress import Progress, Pulse
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.scores import Scores
from tsqlora.run.config import Config
from tsqlora.run.fit import arguments, measure
from tsqlora.run.job import Job, load
from tsqlora.training.fit import Method, fit
from tsqlora.training.live import peak_memory
from tsqlora.training.quality_callback import SCORES_FILE, QualityCallback
from tsqlora.training.record import RunRecord

Equal = Literal["steps", "epochs"]


def run_cell(config: Config, cell: Cell, *, equal: Equal, progress: Progress | None = None) -> dict[str, Any]:
    """Trains and measures a cell in this process; the result is ready for JSON.

    A training that fails, for example by diverging, is a result too: `failed` says how. Wrong settings raise.
    """
    settings = settings_of(config, cell)
    found: dict[str, Any] = {"cell": cell.to_dict(), "equal": equal, "settings": settings.model_dump()}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        job = load(settings)
        steps = planned_steps(job, cell, equal=equal)
        record = RunRecord("running", cell.seed, job.task.name, None, {"hash": job.data.hash}, {"steps": steps})
        try:
            found |= _train(job, cell, steps, record, progress)
        except TsqLoraError as error:
            # The classes below it are of settings and data: nothing that another seed would cure.
            if type(error) is not TsqLoraError:
                raise
            found["failed"] = str(error)
    record.notes += sorted({str(w.message) for w in warned if w.filename.startswith(str(PACKAGE))})
    return found | {
        "settings_hash": settings_hash(settings, cell, equal=equal, data=job.data.hash),
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


def rehearse(job: Job, cell: Cell, equal: Equal) -> None:
    """Builds the cell's model and begins its training, which ends with the look's first batch, or before a step."""
    record = RunRecord("rehearsal", cell.seed, job.task.name, None, {}, {})
    with suppress(_Begun):
        _train(job, cell, planned_steps(job, cell, equal=equal), record, _stop_looking, _StopAtStart())


class _Begun(Exception):
    """Training was about to take its first step."""


def _stop_looking(phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
    raise _Begun


class _StopAtStart(TrainerCallback):
    """Ends a training once the callbacks before it have begun."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        raise _Begun


def settings_of(config: Config, cell: Cell, **further: Any) -> Config:
    """The config with the cell's seed and learning rate, and further arguments of the Trainer; nothing is saved."""
    changes = {"seed": cell.seed, "learning_rate": cell.learning_rate, "save_strategy": "no", **further}
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def settings_hash(settings: Config, cell: Cell, *, equal: Equal, data: str) -> str:
    """SHA-256 of what decides a cell: its settings, method and policy, what is equal, and the hash of its rows.

    The paths of the rows' files are left out.
    """
    about = settings.model_dump(exclude={"data": {"train", "trusted", "validation", "test"}})
    decides = {"settings": about, "cell": cell.to_dict(), "equal": equal, "data": data}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def planned_steps(job: Job, cell: Cell, *, equal: Equal) -> int:
    """Optimizer steps: training.max_steps, else the config's epochs of its fraction.

    With equal epochs, `all` has epochs of all rows.
    """
    config, rows = job.config, len(job.data.samples["train"])
    if config.training.max_steps is not None:
        return config.training.max_steps
    share = 1.0 if cell.entry.policy == "all" and equal == "epochs" else config.quality.fraction
    batches = math.ceil(draw_size(rows, share) / config.training.batch_size)
    window = int(config.training.further_arguments().get("gradient_accumulation_steps", 1))
    return math.ceil(config.training.epochs * math.ceil(batches / window))


def _train(
    job: Job, cell: Cell, steps: int, record: RunRecord, progress: Progress | None, *also: TrainerCallback
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(settings_of(job.config, cell, max_steps=steps), Path(folder))
        distributed.refuse_copies(args.n_gpu)
        rows = POLICIES[cell.entry.policy](job, Path(folder) / SCORES_FILE, progress)
        with record.timed("building"):
            set_seed(cell.seed)
            built, ranks = build(job, cell.entry.method, steps=steps)
        building = record.cost.pop("building")
        building.add(forward=built.cost.forward, backward=built.cost.backward, tokens=built.cost.tokens)
        method, callbacks = Method(rows.data, rows.quality, ranks), (*built.callbacks, *also)
        fit(built.model, args, method, job.inputs, record, also=callbacks, progress=progress)
        record.cost = {"building": building} | record.cost
        measure(job, built.model, record, args, progress)
    return {
        "parameters": {"trainable": built.trainable()},
        "ranks": built.ranks(),
        "quality": _draws(rows),
        "bf16": args.bf16,
    }


def _draws(rows: Rows) -> dict[str, Any]:
    """How many rows there were and an epoch drew; of a policy that scores, whether its scores decided."""
    drawn: dict[str, Any] = {"rows": len(rows.data.dataset), "rows_an_epoch": len(rows.data)}
    if rows.quality is None:
        return drawn
    scores = rows.data.scores
    noise = None if scores is None else scores.record.noise
    random = _why_at_random(rows.quality, scores)
    return drawn | {"looks": rows.quality.looks, "random": random, "noise": noise}


def _why_at_random(quality: QualityCallback, scores: Scores | None) -> str | None:
    """Why a policy that scores drew rows evenly; None where its scores decided, and of a control."""
    if not quality.rule.select:
        return None
    if scores is None:
        return quality.why_not
    guard = scores.record.guard or {}
    if guard.get("passed") is False:
        return str(guard["why"])
    return "no row was left out, and rows are drawn evenly" if scores.even and scores.kept.all() else None
