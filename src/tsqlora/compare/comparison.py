"""Run every cell of a comparison, one training at a time, and tabulate them."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tsqlora import distributed
from tsqlora.compare.cells import Cell, Entry, load, require_rows, save
from tsqlora.compare.methods import entries
from tsqlora.compare.run import Equal, preflight, run_cell
from tsqlora.compare.table import differing, measured_on, rows_of
from tsqlora.compare.worker import in_own_process
from tsqlora.compat.hub import DatasetName, is_hub_id
from tsqlora.errors import DataError, SettingsError, UnsupportedError, nearest
from tsqlora.files import write_json, write_text
from tsqlora.progress import Progress, duration
from tsqlora.reports.comparison import CELLS_DIR, SETTINGS_FILE, TABLE_FILE
from tsqlora.reports.metrics import lower_is_better
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.tasks import get_task
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.text_metrics import TEXT_METRICS
from tsqlora.training.run_dir import CONFIG_FILE, alone_in

EQUAL: tuple[Equal, ...] = ("steps", "epochs")


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
            raise UnsupportedError("compare runs one training at a time in one process; start it without a launcher")
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
        text_metrics = TEXT_METRICS if isinstance(task, Generation) else ()
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
    """Run the cells that `out` lacks, each in its own process, and return the table of all.

    Args:
        methods: names of METHODS, or METHOD+POLICY.
        equal: what all cells share: optimizer steps; or epochs, so that a method with all rows takes more steps.
        sweep: learning rates that every entry tries with the first seed. The rate with the best validation metric
            serves the other seeds; test rows decide nothing.
        rates: learning rates by entry or method, in place of the config's.
        metric: the metric to compare; by default the task's headline metric.

    Every entry without a cell in `out` is checked before the first training. A directory holds one comparison;
    further methods and seeds may be added. Raises SettingsError for another comparison's directory and for what cannot
    be compared; DataError if the data has changed since its cells ran; UnsupportedError under a launcher, with
    adapter.init_from, and for an entry that cannot be trained.
    """
    metric = metric or get_task(config.task.type).headline
    seeds = list(dict.fromkeys(seeds))
    plan = Plan(config, entries(methods), seeds, equal, metric, tuple(sweep), dict(rates or {}))
    plan.require_possible()
    new = [entry for entry in plan.entries if not any((out / CELLS_DIR).glob(f"{entry.name}_seed*.json"))]
    finished = [seed for seed in seeds if any((out / CELLS_DIR).glob(f"*_seed{seed}_lr*.json"))]
    check = partial(preflight, config, new, seeds[0], finished=finished, equal=equal)
    with alone_in(out, busy=f"another comparison is running in {out}; wait for it, or choose another --out"):
        claimed = _is_claimed(plan, out)
        rows = in_own_process("preflight", check)
        if not claimed:
            write_json(out / SETTINGS_FILE, {"equal": plan.equal})
            write_text(out / CONFIG_FILE, dump_config(plan.config))
        require_rows(out, rows)
        cells = Runner(plan, out, progress, say).all()
        options = {"metric": metric, "equal": equal, "seeds": seeds, "sweep": list(sweep), "rates": plan.rates}
        table = rows_of(plan.entries, cells, metric=metric)
        result = {"out": str(out), **options, "table": table, "differing": differing(cells)}
        write_json(out / TABLE_FILE, result)
    return result


class Runner:
    """Run the missing cells and report progress."""

    def __init__(self, plan: Plan, out: Path, progress: Progress | None, say: Callable[[str], None]) -> None:
        self.plan, self.out, self.progress, self.say = plan, out, progress, say
        self.done, self.took = 0, list[float]()

    def all(self) -> list[dict[str, Any]]:
        """The results of every cell, without those of a sweep that were not chosen."""
        plan, results = self.plan, list[dict[str, Any]]()
        rates = {entry: plan.rate(entry) for entry in plan.entries}
        for seed in plan.seeds:
            for entry in plan.entries:
                if seed == plan.seeds[0] and plan.sweep:
                    tried = {rate: self._cell(Cell(entry, seed, rate)) for rate in plan.sweep}
                    rates[entry] = self._best_rate(entry, tried)
                    results.append(tried[rates[entry]])
                else:
                    results.append(self._cell(Cell(entry, seed, rates[entry])))
        return results

    def _best_rate(self, entry: Entry, tried: Mapping[float, Mapping[str, Any]]) -> float:
        """Best on validation by the metric, then by the loss; the smallest rate if every one failed."""
        sign, merit = -1 if lower_is_better(self.plan.metric) else 1, dict[float, tuple[float, float]]()
        for rate, cell in tried.items():
            if "failed" not in cell:
                loss = cell["metrics"]["validation"]["loss"]
                merit[rate] = sign * self._measured(cell, "validation"), -loss
        if not merit:
            return min(tried)  # its failure is the result
        best, lowest, highest = max(merit, key=merit.__getitem__), min(tried), max(tried)
        if lowest < highest and best in (lowest, highest):
            side = "highest" if best == highest else "lowest"
            self.say(f"{entry.name}: {best:g} is the {side} rate of --lr-sweep; a better one may lie beyond it")
        return best

    def _cell(self, cell: Cell) -> dict[str, Any]:
        result = load(self.out, cell)
        reused, start = result is not None, time.perf_counter()
        if result is None:
            work = partial(run_cell, self.plan.config, cell, equal=self.plan.equal)
            result = dict[str, Any](in_own_process(cell.name, work, self.progress))
            save(self.out, cell, result)
            self.took.append(time.perf_counter() - start)
        self.done += 1
        self.say(f"{self.done}/{self.plan.cells} {cell.name}: {self._summary(result, reused=reused)}")
        return result

    def _summary(self, result: Mapping[str, Any], *, reused: bool) -> str:
        left = (self.plan.cells - self.done) * sum(self.took) / max(1, len(self.took))
        when = (" (reused)" if reused else "") + (f"; about {duration(max(60, left))} left" if left else "")
        if "failed" in result:
            return f"failed: {result['failed']}{when}"
        split = measured_on(result)
        return f"{split} {self.plan.metric} {self._measured(result, split):.4f}, {result['seconds']:.0f} s{when}"

    def _measured(self, cell: Mapping[str, Any], split: str) -> float:
        metrics, metric = cell["metrics"][split], self.plan.metric
        if metric not in metrics:
            raise SettingsError(f"--metric '{metric}' is not measured on {split} rows; {nearest(metric, metrics)}")
        return metrics[metric]


def _is_claimed(plan: Plan, out: Path) -> bool:
    """Whether the directory holds this comparison.  Raises SettingsError if it holds another, DataError if damaged."""
    if not (out / CONFIG_FILE).exists():
        return False
    path = out / SETTINGS_FILE
    if not path.exists():
        raise SettingsError(f"{out} holds a run, not a comparison; choose another --out")
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
        before["equal"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); choose another --out") from None
    if load_config(out / CONFIG_FILE) != plan.config or before != {"equal": plan.equal}:
        raise SettingsError(f"{out} holds a comparison with other settings; choose another --out")
    return True
