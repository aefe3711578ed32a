"""Train one run of a comparison; rehearse every entry before the first one."""

import gc
import math
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, set_seed

from tsqlora import distributed
from tsqlora.compare.methods import POLICIES, Entry, build
from tsqlora.data.splits import prepare
from tsqlora.data.table import data_hash
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.files import write_text
from tsqlora.progress import Progress, Pulse
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.sampling import draw_size
from tsqlora.run.config import Config, dump_config
from tsqlora.run.fit import arguments, begin, measure
from tsqlora.run.job import Job, load, load_model, read
from tsqlora.training.fit import Method, fit
from tsqlora.training.record import RECORD_FILE, RunRecord
from tsqlora.training.run_dir import CONFIG_FILE, SCORES_FILE
from tsqlora.training.tell_progress import peak_memory

Equal = Literal["steps", "epochs"]
PACKAGE = Path(__file__).parents[1]


def run_cell(config: Config, entry: Entry, run: Path, *, equal: Equal, progress: Progress | None = None) -> RunRecord:
    """Train and measure an entry in this process, by the config's seed and learning rate, into a run directory.

    A training that fails, for example because it diverges, is a result too: the record's status is "failed", and
    `compared` says how. Wrong settings raise. An unfinished run in the directory is replaced.
    """
    for name in (CONFIG_FILE, RECORD_FILE, SCORES_FILE):
        (run / name).unlink(missing_ok=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        record = _train(load(config), entry, run, equal, progress)
    record.notes = list(dict.fromkeys([*record.notes, *sorted(_ours(warned))]))
    record.save(run)
    return record


def _ours(warned: Sequence[warnings.WarningMessage]) -> set[str]:
    return {str(w.message) for w in warned if w.filename.startswith(str(PACKAGE))}


def _train(
    job: Job, entry: Entry, run: Path, equal: Equal, progress: Progress | None, *also: TrainerCallback
) -> RunRecord:
    steps = planned_steps(job, entry, equal=equal)
    training = job.config.training.model_copy(update={"max_steps": steps, "save_strategy": "no"})
    job = replace(job, config=job.config.model_copy(update={"training": training}))
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(job.config, Path(folder))
        distributed.refuse_copies(args.n_gpu)
        method = POLICIES[entry.policy](job, run / SCORES_FILE, progress)
        start = time.perf_counter()
        set_seed(training.seed)
        built, ranks = build(job, entry.method, steps=steps)
        building = PhaseCost(seconds=time.perf_counter() - start)
        method = replace(method, ranks=ranks)
        record = begin(job, args, method, built.model)
        about = {"method": entry.method, "policy": entry.policy, "learning_rate": training.learning_rate}
        record.compared = {**about, "equal": equal, "bf16": args.bf16, "commit": commit()}
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / CONFIG_FILE, dump_config(job.config))
        try:
            also = (*built.callbacks, *also)
            fit(built.model, args, method, job.inputs, record, also=also, progress=progress, run=run)
            measure(job, built.model, record, args, progress)
        except TsqLoraError as error:
            # Subclasses are errors of settings and data, which no other seed would cure.
            if type(error) is not TsqLoraError:
                raise
            record.status, record.now, record.compared["failed"] = "failed", {}, str(error)
    record.cost = {"building": building} | record.cost
    record.parameters, record.ranks = {"trainable": built.trainable()}, built.ranks()
    record.compared |= {"peak_memory_bytes": peak_memory(), "random": _why_at_random(method)}
    return record


def _why_at_random(method: Method) -> str | None:
    """Why a policy with scores drew rows evenly; None if its scores decided, and for a control."""
    quality, scores = method.quality, method.data.scores
    if quality is None or not quality.rule.select:
        return None
    if scores is None:
        return quality.why_not
    return "no row was left out, and rows are drawn evenly" if scores.even and scores.kept.all() else None


def preflight(
    config: Config, entries: Sequence[Entry], seed: int, *, finished: Sequence[int], equal: Equal
) -> dict[int, str]:
    """Rehearse every entry with `seed`, and return the hash of the rows of each finished seed.

    A rehearsal builds the entry's model and stops its training before the first step, so that each method's own checks
    run. Raises SettingsError and UnsupportedError naming the entry.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # each run records its own
        job = load(with_seed(config, seed))
        for entry in entries:
            pretrained = load_model(job.config, job.task, job.train.classes)
            try:
                with suppress(_Begun):
                    _train(replace(job, pretrained=pretrained), entry, Path(folder, entry.name), equal, _stop, _Stop())
            except (SettingsError, UnsupportedError) as error:
                raise type(error)(f"{entry.name}: {error}") from error
            finally:
                gc.collect()  # a Trainer holds its model in reference cycles
        return {other: _rows_hash(job, with_seed(config, other)) for other in finished}


def with_seed(config: Config, seed: int, learning_rate: float | None = None) -> Config:
    """The config with this seed, and with this learning rate unless None."""
    changes: dict[str, Any] = {"seed": seed} | ({} if learning_rate is None else {"learning_rate": learning_rate})
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _rows_hash(job: Job, config: Config) -> str:
    # The seed decides the rows only if it splits off the validation rows.
    if config.data.validation is not None or config.training.seed == job.config.training.seed:
        return data_hash(job.data)
    how: dict[str, Any] = {"encode": job.task.reading.encode, "most": config.data.max_bad_rows}
    return data_hash(prepare(read(config), job.pretrained.tokenizer, max_length=job.max_length, **how))


class _Begun(Exception):
    """Training reached its first step."""


def _stop(phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
    raise _Begun


class _Stop(TrainerCallback):
    """End a training once all earlier callbacks have started."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Begun


def planned_steps(job: Job, entry: Entry, *, equal: Equal) -> int:
    """Optimizer steps: training.max_steps, else the config's epochs of its fraction.

    With equal epochs, the policy `all` has epochs of all rows.
    """
    config, rows = job.config, len(job.train)
    if config.training.max_steps is not None:
        return config.training.max_steps
    share = 1.0 if entry.policy == "all" and equal == "epochs" else config.quality.fraction
    batches = math.ceil(draw_size(rows, share) / config.training.batch_size)
    window = int(config.training.further_arguments().get("gradient_accumulation_steps", 1))
    return math.ceil(config.training.epochs * math.ceil(batches / window))


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
