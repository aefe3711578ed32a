"""Train and measure one cell of a comparison; rehearse every entry before the first cell."""

import gc
import math
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, set_seed

from tsqlora import distributed
from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.methods import POLICIES, build
from tsqlora.data.prepare import prepare
from tsqlora.data.table import data_hash
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.progress import Progress, Pulse
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.scores import Scores
from tsqlora.run.config import Config
from tsqlora.run.fit import arguments, measure
from tsqlora.run.job import Job, load, load_model, read
from tsqlora.training.fit import Method, fit
from tsqlora.training.quality_callback import SCORES_FILE, QualityCallback
from tsqlora.training.record import RunRecord
from tsqlora.training.report_callback import peak_memory

Equal = Literal["steps", "epochs"]
PACKAGE = Path(__file__).parents[1]


def run_cell(config: Config, cell: Cell, *, equal: Equal, progress: Progress | None = None) -> dict[str, Any]:
    """Train and measure a cell in this process; return plain values, ready for JSON.

    A training that fails, for example because it diverges, is a result too: `failed` says how. Wrong settings raise.
    """
    settings = settings_of(config, cell)
    result: dict[str, Any] = {"cell": cell.to_dict(), "equal": equal, "settings": settings.model_dump()}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        job = load(settings)
        steps = planned_steps(job, cell, equal=equal)
        record = RunRecord("running", cell.seed, job.task.name, None, {"hash": data_hash(job.data)}, {"steps": steps})
        try:
            result |= _train(job, cell, steps, record, progress)
        except TsqLoraError as error:
            # Subclasses are errors of settings and data, which no other seed would cure.
            if type(error) is not TsqLoraError:
                raise
            result["failed"] = str(error)
    record.notes += sorted({str(w.message) for w in warned if w.filename.startswith(str(PACKAGE))})
    return result | {
        "steps": steps,
        "metrics": record.metrics,
        "cost": {phase: asdict(cost) for phase, cost in record.cost.items()},
        "seconds": sum(cost.seconds for phase, cost in record.cost.items() if phase != "evaluation"),
        "peak_memory_bytes": peak_memory(),
        "data_hash": data_hash(job.data),
        "task": job.task.name,
        "notes": record.notes,
        "versions": record.versions,
        "commit": commit(),
    }


def preflight(
    config: Config, entries: Sequence[Entry], seed: int, *, finished: Sequence[int], equal: Equal
) -> dict[int, str]:
    """Rehearse every entry with `seed`, and return the hash of the rows of each finished seed.

    A rehearsal builds the entry's model and stops its training before the first step, so that each method's own checks
    run. Raises SettingsError and UnsupportedError naming the entry.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each cell records its own
        job = load(settings_of(config, _plain_cell(config, seed)))
        for entry in entries:
            pretrained = load_model(job.config, job.task, job.train.classes)
            cell = Cell(entry, seed, config.training.learning_rate)
            try:
                _rehearse(replace(job, pretrained=pretrained), cell, equal)
            except (SettingsError, UnsupportedError) as error:
                raise type(error)(f"{entry.name}: {error}") from error
            finally:
                gc.collect()  # a Trainer holds its model in reference cycles
        return {seed: _rows_hash(job, settings_of(config, _plain_cell(config, seed))) for seed in finished}


def _plain_cell(config: Config, seed: int) -> Cell:
    return Cell(Entry("lora", "all"), seed, config.training.learning_rate)


def _rows_hash(job: Job, config: Config) -> str:
    # The seed decides the rows only if it splits off the validation rows.
    if config.data.validation is not None or config.training.seed == job.config.training.seed:
        return data_hash(job.data)
    tokenizer, seq2seq = job.pretrained.tokenizer, config.task.type == "seq2seq"
    return data_hash(prepare(read(config), tokenizer, max_length=job.max_length, seq2seq=seq2seq))


class _Begun(Exception):
    """Training reached its first step."""


def _rehearse(job: Job, cell: Cell, equal: Equal) -> None:
    def stop(phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
        raise _Begun

    record = RunRecord("rehearsal", cell.seed, job.task.name, None, {}, {})
    with suppress(_Begun):
        _train(job, cell, planned_steps(job, cell, equal=equal), record, stop, _StopAtStart())


class _StopAtStart(TrainerCallback):
    """End a training once all earlier callbacks have started."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Begun


def settings_of(config: Config, cell: Cell, **further: Any) -> Config:
    """The config with the cell's seed and learning rate and further Trainer arguments; it saves no checkpoints."""
    changes = {"seed": cell.seed, "learning_rate": cell.learning_rate, "save_strategy": "no", **further}
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def planned_steps(job: Job, cell: Cell, *, equal: Equal) -> int:
    """Optimizer steps: training.max_steps, else the config's epochs of its fraction.

    With equal epochs, the policy `all` has epochs of all rows.
    """
    config, rows = job.config, len(job.train)
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
        method = POLICIES[cell.entry.policy](job, Path(folder) / SCORES_FILE, progress)
        with record.timed("building"):
            set_seed(cell.seed)
            built, ranks = build(job, cell.entry.method, steps=steps)
        building = record.cost.pop("building")
        building.add(forward=built.cost.forward, backward=built.cost.backward, tokens=built.cost.tokens)
        method = replace(method, ranks=ranks)
        fit(built.model, args, method, job.inputs, record, also=(*built.callbacks, *also), progress=progress)
        record.cost = {"building": building} | record.cost
        measure(job, built.model, record, args, progress)
    return {
        "parameters": {"trainable": built.trainable()},
        "ranks": built.ranks(),
        "quality": _draws(method),
        "bf16": args.bf16,
    }


def _draws(method: Method) -> dict[str, Any]:
    """Rows in all and in an epoch; for a policy that scores rows, its looks and whether its scores decided."""
    drawn: dict[str, Any] = {"rows": len(method.data.dataset), "rows_an_epoch": len(method.data)}
    if method.quality is None:
        return drawn
    scores = method.data.scores
    noise = None if scores is None else scores.record.noise
    return drawn | {"looks": method.quality.looks, "random": _why_at_random(method.quality, scores), "noise": noise}


def _why_at_random(quality: QualityCallback, scores: Scores | None) -> str | None:
    """Why a policy with scores drew rows evenly; None if its scores decided, and for a control."""
    if not quality.rule.select:
        return None
    if scores is None:
        return quality.why_not
    return "no row was left out, and rows are drawn evenly" if scores.even and scores.kept.all() else None


@cache
def commit() -> str | None:
    """The commit of the imported code at the first call."""
    return commit_of(PACKAGE)


def commit_of(package: Path) -> str | None:
    """The commit of a source checkout, with "-dirty" if the package differs from it; None if it is installed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True).stdout

    try:
        # A virtual environment may lie inside another project's checkout, which does not track this file.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
