"""Runs every cell of a comparison, one training at a time, and makes the table of all."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tsqlora.compare.cells import Cell, Entry, known_seeds, load, require_rows, save
from tsqlora.compare.methods import entries
from tsqlora.compare.plan import Plan
from tsqlora.compare.preflight import preflight
from tsqlora.compare.run import Equal, run_cell
from tsqlora.compare.table import differing, measured_on, rows_of
from tsqlora.compare.worker import in_own_process
from tsqlora.errors import DataError, SettingsError, nearest
from tsqlora.files import write_json, write_text
from tsqlora.progress import Progress
from tsqlora.reports.comparison import SETTINGS_FILE, TABLE_FILE
from tsqlora.reports.metrics import lower_is_better
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.tasks import get_task
from tsqlora.training.run_dir import CONFIG_FILE, alone_in


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
    """Runs the cells that `out` does not have yet, each in a process of its own, and returns the table of all.

    Args:
        methods: names of METHODS, or METHOD+POLICY.
        equal: what all cells share: optimizer steps; or epochs, where a method with all rows takes more steps.
        sweep: learning rates that every entry tries with the first seed; the one with the best
            validation metric is used for the other seeds. Test rows decide nothing.
        rates: learning rates by entry or method, in place of the config's.
        metric: what is compared; by default the task's.

    Every entry that `out` has no cell of is checked before the first is trained. A directory holds one comparison:
    further methods and seeds may be added. Raises SettingsError for another's, and for what cannot be compared;
    DataError where its cells are of other rows than the data has now; UnsupportedError under a launcher, with
    adapter.init_from, and naming an entry that cannot be trained.
    """
    metric = metric or get_task(config.task.type).headline
    seeds = list(dict.fromkeys(seeds))
    plan = Plan(config, entries(methods), seeds, equal, metric, tuple(sweep), dict(rates or {}))
    plan.require_possible()
    new = [entry for entry in plan.entries if not any(out.glob(f"cells/{entry.name}_seed*.json"))]
    check = partial(preflight, config, new, seeds[0], known=known_seeds(out, seeds), equal=equal)
    rows = in_own_process("preflight", check)
    with alone_in(out, busy=f"another comparison is running in {out}; wait for it, or name another --out"):
        _claim(plan, out)
        require_rows(out, rows)
        cells = Runner(plan, out, progress, say).all()
        options = {"metric": metric, "equal": equal, "seeds": seeds, "sweep": list(sweep), "rates": plan.rates}
        table = rows_of(plan.entries, cells, metric=metric)
        result = {"out": str(out), **options, "table": table, "differing": differing(cells)}
        write_json(out / TABLE_FILE, result)
    return result


class Runner:
    """Runs the cells that are missing, and says how far it is."""

    def __init__(self, plan: Plan, out: Path, progress: Progress | None, say: Callable[[str], None]) -> None:
        self.plan, self.out, self.progress, self.say = plan, out, progress, say
        self.done, self.took = 0, list[float]()

    def all(self) -> list[dict[str, Any]]:
        """The results of every cell, without those of a sweep that were not chosen."""
        plan, found = self.plan, list[dict[str, Any]]()
        rates = {entry: plan.rate(entry) for entry in plan.entries}
        for seed in plan.seeds:
            for entry in plan.entries:
                if seed == plan.seeds[0] and plan.sweep:
                    tried = {rate: self._cell(Cell(entry, seed, rate)) for rate in plan.sweep}
                    rates[entry] = self._best_rate(entry, tried)
                    found.append(tried[rates[entry]])
                else:
                    found.append(self._cell(Cell(entry, seed, rates[entry])))
        return found

    def _best_rate(self, entry: Entry, tried: Mapping[float, Mapping[str, Any]]) -> float:
        """By validation: the metric, and where that ties the loss; the smallest where every one failed."""
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
        found = load(self.out, cell)
        known, begun = found is not None, time.perf_counter()
        if found is None:
            work = partial(run_cell, self.plan.config, cell, equal=self.plan.equal)
            found = dict[str, Any](in_own_process(cell.name, work, self.progress))
            save(self.out, cell, found)
            self.took.append(time.perf_counter() - begun)
        self.done += 1
        self.say(f"{self.done}/{self.plan.cells} {cell.name}: {self._told(found, known=known)}")
        return found

    def _told(self, found: Mapping[str, Any], *, known: bool) -> str:
        left = (self.plan.cells - self.done) * sum(self.took) / max(1, len(self.took))
        when = (" (known)" if known else "") + (f"; about {_duration(left)} left" if left else "")
        if "failed" in found:
            return f"failed: {found['failed']}{when}"
        split = measured_on(found)
        return f"{split} {self.plan.metric} {self._measured(found, split):.4f}, {found['seconds']:.0f} s{when}"

    def _measured(self, cell: Mapping[str, Any], split: str) -> float:
        metrics, metric = cell["metrics"][split], self.plan.metric
        if metric not in metrics:
            raise SettingsError(f"--metric '{metric}' is not measured on {split} rows; {nearest(metric, metrics)}")
        return metrics[metric]


def _duration(seconds: float) -> str:
    """
    >>> _duration(4000)
    '1 h 7 min'
    """
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _claim(plan: Plan, out: Path) -> None:
    """Writes what the directory is for, or checks that it is for the same."""
    about = {"equal": plan.equal}
    if not (out / CONFIG_FILE).exists():
        write_json(out / SETTINGS_FILE, about)
        write_text(out / CONFIG_FILE, dump_config(plan.config))
        return
    if not (out / SETTINGS_FILE).exists():
        raise SettingsError(f"{out} holds a run, and no comparison; name another --out")
    if load_config(out / CONFIG_FILE) != plan.config or _claimed(out / SETTINGS_FILE) != about:
        raise SettingsError(f"{out} holds a comparison with other settings; name another --out")


def _claimed(path: Path) -> dict[str, str]:
    """What a directory is for.  Raises DataError for a file that is not ours."""
    try:
        claimed = dict(json.loads(path.read_text(encoding="utf-8")))
        claimed["equal"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not what compare writes ({type(error).__name__}: {error}); name another --out"
        ) from None
    return claimed
