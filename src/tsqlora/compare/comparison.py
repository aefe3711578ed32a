"""Run every method with every seed, one training at a time on each GPU, and tabulate the runs."""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import torch

from tsqlora import distributed
from tsqlora.compare.cell import Equal, preflight, run_cell, with_seed
from tsqlora.compare.methods import Entry, entries
from tsqlora.compare.worker import in_own_process
from tsqlora.compat.hub import DatasetName, is_hub_id
from tsqlora.errors import DataError, SettingsError, UnsupportedError, nearest
from tsqlora.files import write_json, write_text
from tsqlora.progress import Progress, duration
from tsqlora.reports.comparison import COMPARISON_FILE, made_by, measured_on, methods_of, seconds_of
from tsqlora.reports.metrics import lower_is_better
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.tasks import get_task
from tsqlora.tasks.text_metrics import TEXT_METRICS
from tsqlora.training.record import RECORD_FILE, RunRecord
from tsqlora.training.run_dir import CONFIG_FILE, alone_in

EQUAL: tuple[Equal, ...] = ("steps", "epochs")


class Cell(NamedTuple):
    """One training of an entry; `name` is its directory."""

    entry: Entry
    seed: int
    learning_rate: float
    name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The cells of a comparison: every entry with every seed."""

    config: Config
    entries: list[Entry]
    seeds: list[int]
    equal: Equal
    metric: str
    sweep: tuple[float, ...]
    rates: dict[str, float]

    @property
    def cells(self) -> int:
        """Number of cells; a sweep adds one per further rate for the first seed."""
        return len(self.entries) * (len(self.seeds) - 1 + max(1, len(self.sweep)))

    def rate(self, entry: Entry) -> float:
        """The learning rate of an entry without a sweep."""
        by_method = self.rates.get(entry.method, self.config.training.learning_rate)
        return self.rates.get(entry.name, by_method)

    def cell(self, entry: Entry, seed: int, rate: float) -> Cell:
        """The name has a learning rate that is not the config's."""
        other = f".lr{rate:g}" if rate != self.config.training.learning_rate else ""
        return Cell(entry, seed, rate, f"{entry.name}.{seed}{other}")

    def require_possible(self) -> None:
        """Raises SettingsError and UnsupportedError for arguments and settings that no comparison can follow."""
        self._require_arguments()
        self._require_settings()
        self._require_metric()

    def _require_arguments(self) -> None:
        if not self.seeds:
            raise SettingsError("--seeds is empty; give at least one, such as 0,1,2")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise SettingsError(f"--seeds {seed} is out of range; give 0 to {2**32 - 1}")
        if self.equal not in EQUAL:
            raise SettingsError(f"--equal '{self.equal}' is unknown; {nearest(self.equal, EQUAL)}")
        if self.sweep and self.rates:
            raise SettingsError("--lr-sweep chooses learning rates, and --lr sets them; remove one")
        for rate in (*self.sweep, *self.rates.values()):
            if not 0 < rate < math.inf:
                raise SettingsError(f"learning rate {rate} must be finite and above 0")
        compared = {entry.name for entry in self.entries} | {entry.method for entry in self.entries}
        for name in self.rates:
            if name not in compared:
                raise SettingsError(f"--lr: '{name}' is not compared; {nearest(name, compared)}")

    def _require_settings(self) -> None:
        config = self.config
        if distributed.launched() > 1:
            raise UnsupportedError("compare starts a process for each training itself; start it without a launcher")
        if config.adapter.init_from is not None:
            raise UnsupportedError("compare trains every method from scratch; remove adapter.init_from")
        if config.training.further_arguments().get("load_best_model_at_end"):
            raise SettingsError(
                "training.load_best_model_at_end needs checkpoints, and compare saves none; remove it: every training "
                "is measured at its end"
            )
        for entry in self.entries:
            if entry.policy == "quality" and not config.quality.enabled:
                raise SettingsError(
                    f"{entry.name} draws rows by quality, and quality.enabled is false; set it to true, or remove "
                    f"{entry.name}"
                )

    def _require_metric(self) -> None:
        """Refuse a metric that no cell would measure, or that a sweep could not use."""
        task, data = get_task(self.config.task.type), self.config.data
        text_metrics = TEXT_METRICS if task.writer is not None else ()
        if self.metric not in (*task.measured, *text_metrics):
            options = nearest(self.metric, (*task.measured, *text_metrics))
            raise SettingsError(f"--metric '{self.metric}' is not measured for {task.name}; {options}")
        if self.metric not in text_metrics:
            return
        # A directory or a hub data set may have a test split.
        hub = DatasetName.of(data.train)
        may_have_test = Path(data.train).expanduser().is_dir() or (hub.split is None and is_hub_id(hub.id))
        if not (data.test or may_have_test) or data.format == "text":
            raise SettingsError(
                f"--metric '{self.metric}' compares generated texts with the targets of test rows, and there are none; "
                f"set data.test to rows with prompts and targets, or {nearest(self.metric, task.measured)}"
            )
        if self.sweep:
            raise SettingsError(
                f"--lr-sweep chooses by validation rows, and --metric '{self.metric}' is measured on test rows alone; "
                f"{nearest(self.metric, task.measured)}"
            )


def compare(
    config: Config,
    methods: Sequence[str],
    *,
    seeds: Sequence[int],
    out: Path,
    equal: Equal = "steps",
    sweep: Sequence[float] = (),
    rates: Mapping[str, float] | None = None,
    metric: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the trainings that `out` lacks, each in its own process, and return the table of all.

    Args:
        methods: names of METHODS, or METHOD+POLICY.
        equal: what all cells share: optimizer steps; or epochs, so that a method with all rows takes more steps.
        sweep: learning rates that every entry tries with the first seed. The rate with the best validation metric
            serves the other seeds; test rows decide nothing.
        rates: learning rates by entry or method, in place of the config's.
        metric: the metric to compare; by default the task's headline metric.

    Each training is a run directory in `out`, without an adapter. Of several GPUs each trains one at a time.
    Every entry without a run there is checked before the
    first training. A directory holds one comparison;
    further methods and seeds may be added. Raises SettingsError for another comparison's directory and for what cannot
    be compared; DataError if the data has changed since its runs; UnsupportedError under a launcher, with
    adapter.init_from, and for an entry that cannot be trained.
    """
    metric = metric or get_task(config.task.type).headline
    seeds = list(dict.fromkeys(seeds))
    plan = Plan(config, entries(methods), seeds, equal, metric, tuple(sweep), dict(rates or {}))
    plan.require_possible()
    new = [entry for entry in plan.entries if not any(out.glob(f"{entry.name}.*/{RECORD_FILE}"))]
    finished = [seed for seed in seeds if any(run.seed == seed for run in _finished(out).values())]
    check = partial(preflight, config, new, seeds[0], finished=finished, equal=equal)
    with alone_in(out, busy=f"another comparison is running in {out}; wait for it, or choose another --out"):
        claimed = _is_claimed(plan, out)
        devices = _devices()
        rows = in_own_process("preflight", check, device=devices[0] if len(devices) > 1 else None)
        if not claimed:
            write_json(out / COMPARISON_FILE, {"equal": plan.equal})
            write_text(out / CONFIG_FILE, dump_config(plan.config))
        for name, run in _finished(out).items():
            if run.data["hash"] != rows.get(run.seed, run.data["hash"]):
                raise DataError(
                    f"{out / name} was trained on other rows (hash {run.data['hash']}) than the data has now "
                    f"({rows[run.seed]}); choose another --out, or restore the data"
                )
        runs = Runner(plan, out, progress, say, devices).all()
        result: dict[str, Any] = {
            "out": str(out),
            "metric": metric,
            "equal": equal,
            "seeds": seeds,
            "sweep": list(sweep),
            "rates": plan.rates,
            "runs": [*runs],
            "table": [method.row() for method in methods_of([*runs.values()], metric)],
            "differing": {name: made for name, made in made_by([*runs.values()]).items() if len(made) > 1},
        }
        write_json(out / COMPARISON_FILE, result)
    return result


class Runner:
    """Run the missing cells, one at a time on each of several devices, and report progress."""

    def __init__(
        self, plan: Plan, out: Path, progress: Progress | None, say: Callable[[str], None], devices: Sequence[str]
    ) -> None:
        self.plan, self.out, self.progress, self.say = plan, out, progress, say
        self.devices, self.lock = devices, Lock()
        self.done, self.took = 0, list[float]()

    def all(self) -> dict[str, RunRecord]:
        """The run of every cell by its directory, without those of a sweep that were not chosen."""
        plan, rates = self.plan, {entry: self.plan.rate(entry) for entry in self.plan.entries}
        swept = self._each([plan.cell(entry, plan.seeds[0], rate) for entry in plan.entries for rate in plan.sweep])
        for entry in plan.entries if swept else ():
            tried = {cell.learning_rate: run for cell, run in swept.items() if cell.entry == entry}
            rates[entry] = self._best_rate(entry, tried)
        cells = [plan.cell(entry, seed, rates[entry]) for seed in plan.seeds for entry in plan.entries]
        runs = swept | self._each([cell for cell in cells if cell not in swept])
        return {cell.name: runs[cell] for cell in cells}

    def _each(self, cells: Sequence[Cell]) -> dict[Cell, RunRecord]:
        """The run of each cell; of several devices each has one at a time."""
        if len(self.devices) < 2:
            return {cell: self._run(cell) for cell in cells}
        free = SimpleQueue[str]()
        for device in self.devices:
            free.put(device)

        def run(cell: Cell) -> RunRecord:
            device = free.get()
            try:
                return self._run(cell, device)
            finally:
                free.put(device)

        with ThreadPoolExecutor(len(self.devices)) as pool:
            try:
                return dict(zip(cells, pool.map(run, cells), strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.kill()
                raise

    def _best_rate(self, entry: Entry, tried: Mapping[float, RunRecord]) -> float:
        """Best on validation by the metric, then by the loss; the smallest rate if every one failed."""
        sign, merit = -1 if lower_is_better(self.plan.metric) else 1, dict[float, tuple[float, float]]()
        for rate, run in tried.items():
            if run.status != "failed":
                merit[rate] = sign * self._measured(run, "validation"), -run.metrics["validation"]["loss"]
        if not merit:
            return min(tried)  # its failure is the result
        best, lowest, highest = max(merit, key=merit.__getitem__), min(tried), max(tried)
        if lowest < highest and best in (lowest, highest):
            side = "highest" if best == highest else "lowest"
            self.say(f"{entry.name}: {best:g} is the {side} rate of --lr-sweep; a better one may lie beyond it")
        return best

    def _run(self, cell: Cell, device: str | None = None) -> RunRecord:
        """The cell's run, trained now unless it has ended before, and a line about it."""
        run, start = _ended(self.out / cell.name, cell), time.perf_counter()
        reused = run is not None
        if run is None:
            config = with_seed(self.plan.config, cell.seed, cell.learning_rate)
            work = partial(run_cell, config, cell.entry, self.out / cell.name, equal=self.plan.equal)
            run = in_own_process(cell.name, work, self.progress if device is None else None, device=device)
            assert isinstance(run, RunRecord)
        with self.lock:
            self._report(cell, run, None if reused else time.perf_counter() - start)
        return run

    def _report(self, cell: Cell, run: RunRecord, took: float | None) -> None:
        """Say how a cell ended, and about how long the others take."""
        self.took += [] if took is None else [took]
        self.done += 1
        left = (self.plan.cells - self.done) * sum(self.took) / max(1, len(self.took)) / max(1, len(self.devices))
        when = (" (reused)" if took is None else "") + (f"; about {duration(max(60, left))} left" if left else "")
        if run.status == "failed":
            summary = f"failed: {run.compared['failed']}"
        else:
            split = measured_on(run)
            summary = f"{split} {self.plan.metric} {self._measured(run, split):.4f}, {seconds_of(run):.0f} s"
        self.say(f"{self.done}/{self.plan.cells} {cell.name}: {summary}{when}")

    def _measured(self, run: RunRecord, split: str) -> float:
        metrics, metric = run.metrics[split], self.plan.metric
        if metric not in metrics:
            raise SettingsError(f"--metric '{metric}' is not measured on {split} rows; {nearest(metric, metrics)}")
        return metrics[metric]


def _devices() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(j) for j in range(count)] if not visible else visible.split(",")[:count]


def _ended(folder: Path, cell: Cell) -> RunRecord | None:
    """The record of a cell that has been trained, or failed; None if it has to run.

    Raises DataError for the run of another cell, and for a damaged record.
    """
    if not (folder / RECORD_FILE).exists():
        return None
    run = RunRecord.load(folder)
    if run.status == "running":
        return None
    about = (run.seed, *(run.compared.get(name) for name in ("method", "policy", "learning_rate")))
    if about != (cell.seed, cell.entry.method, cell.entry.policy, cell.learning_rate):
        raise DataError(f"{folder} holds another run; remove it, and {cell.name} runs again")
    return run


def _finished(out: Path) -> dict[str, RunRecord]:
    """The runs of a comparison that have ended, by their directories."""
    runs = {path.parent.name: RunRecord.load(path.parent) for path in sorted(out.glob(f"*/{RECORD_FILE}"))}
    return {name: run for name, run in runs.items() if run.compared and run.status != "running"}


def _is_claimed(plan: Plan, out: Path) -> bool:
    """Whether the directory holds this comparison.  Raises SettingsError if it holds another, DataError if damaged."""
    if not (out / CONFIG_FILE).exists():
        return False
    path = out / COMPARISON_FILE
    if not path.exists():
        raise SettingsError(f"{out} holds a run, not a comparison; choose another --out")
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
        equal = before["equal"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); choose another --out") from None
    if load_config(out / CONFIG_FILE) != plan.config or equal != plan.equal:
        raise SettingsError(f"{out} holds a comparison with other settings; choose another --out")
    return True
