"""Every cell of a comparison, one training at a time, and the table that they make."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsqlora import distributed
from tsqlora.compare.cells import Cell, Entry, known_seeds, load, require_rows, save
from tsqlora.compare.methods import METHODS, entries
from tsqlora.compare.run import Equal
from tsqlora.compare.table import differing, rows_of
from tsqlora.compare.worker import checked_in_own_process, in_own_process
from tsqlora.compat.hub import is_hub_id
from tsqlora.errors import DataError, SettingsError, UnsupportedError, nearest
from tsqlora.files import write_json, write_text
from tsqlora.progress import Progress
from tsqlora.report.metrics import lower_is_better
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.tasks import get_task
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.texts import TEXT_METRICS
from tsqlora.training.run_dir import CONFIG_FILE, alone_in

SETTINGS_FILE, TABLE_FILE = "comparison.json", "table.json"
EQUAL: tuple[Equal, ...] = ("steps", "epochs", "seconds")
Run = Callable[..., dict[str, Any]]
Check = Callable[..., dict[int, str]]


def compare(
    config: Config,
    methods: Sequence[str],
    *,
    seeds: Sequence[int],
    out: Path,
    policies: Sequence[str] = (),
    equal: Equal = "steps",
    sweep: Sequence[float] = (),
    rates: Mapping[str, float] | None = None,
    metric: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
    run: Run = in_own_process,
    check: Check = checked_in_own_process,
) -> dict[str, Any]:
    """Runs what was not run yet, a cell at a time in a process of its own; the table of all.

    Args:
        methods: names of METHODS, or METHOD+POLICY.
        policies: crosses every method with these; by default each has its own.
        equal: what all cells share: optimizer steps; epochs, where who has all rows takes more steps;
            or the seconds of the first method's cell with as many epochs as the config says.
        sweep: learning rates that every entry tries with the first seed; the one with the best
            validation metric is used for the other seeds. Test rows decide nothing.
        rates: learning rates by entry or method, in place of the config's.
        metric: what is compared; by default the task's.

    Every entry is checked before the first is trained. A directory holds one comparison: further methods and seeds may
    be added. Raises SettingsError for another's, and for what cannot be compared; DataError where its cells are of
    other rows than the data has now; UnsupportedError under a launcher, with adapter.init_from, and naming an entry
    that cannot be trained.
    """
    if distributed.launched() > 1:
        raise UnsupportedError("compare runs one training at a time in one process; start it without a launcher")
    if config.adapter.init_from is not None:
        raise UnsupportedError("compare begins every method anew; leave out adapter.init_from")
    plan = Plan(
        config, entries(methods, policies), list(dict.fromkeys(seeds)), out, equal, tuple(sweep), dict(rates or {})
    )
    plan.require_sense()
    plan.require_followed()
    metric = metric or get_task(config.task.type).headline
    plan.require_measured(metric)
    rows = check(config, plan.entries, plan.seeds[0], known=known_seeds(out, plan.seeds), equal=equal)
    with alone_in(out, busy=f"another comparison is running in {out}; wait for it, or name another --out"):
        _claim(plan)
        require_rows(out, rows)
        runner = Runner(plan, metric, run, progress, say)
        found = runner.all()
        table = rows_of(plan.entries, found, metric=metric)
        asked = {"metric": metric, "equal": equal, "seeds": plan.seeds, "sweep": list(sweep), "rates": plan.rates}
        result = {"out": str(out), **asked, "table": table, "differing": differing(found)}
        write_json(out / TABLE_FILE, result)
    return result


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison is of."""

    config: Config
    entries: list[Entry]
    seeds: list[int]
    out: Path
    equal: Equal
    sweep: tuple[float, ...]
    rates: dict[str, float]

    def require_sense(self) -> None:
        """Raises SettingsError for arguments that say nothing, or contradict each other."""
        if not self.seeds:
            raise SettingsError("--seeds is empty; give at least one, such as 0,1,2")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise SettingsError(f"--seeds {seed}: it must be at least 0 and less than {2**32}")
        if self.equal not in EQUAL:
            raise SettingsError(f"--equal '{self.equal}' is unknown; {nearest(self.equal, EQUAL)}")
        if self.sweep and self.rates:
            raise SettingsError("--lr-sweep chooses learning rates, and --lr gives them; leave out one")
        for rate in (*self.sweep, *self.rates.values()):
            if not 0 < rate < math.inf:
                raise SettingsError(f"learning rate {rate} must be above 0 and finite")
        known = {entry.name for entry in self.entries} | {entry.method for entry in self.entries}
        for name in self.rates:
            if name not in known:
                raise SettingsError(f"--lr: '{name}' is not compared; {nearest(name, known)}")

    def require_followed(self) -> None:
        """Raises SettingsError for settings that compare, or one of its entries, would not follow."""
        config = self.config
        if config.training.further_arguments().get("load_best_model_at_end"):
            raise SettingsError(
                "training.load_best_model_at_end needs checkpoints, and compare keeps none, for each training is "
                "measured at its end; leave it out"
            )
        for entry in self.entries:
            if entry.policy == "quality" and not config.quality.enabled:
                raise SettingsError(
                    f"quality.enabled is false, and {entry.name} draws by quality; set it to true, or leave out "
                    f"{entry.name}"
                )
            if METHODS[entry.method].rival is None and config.ranks.policy == "fixed":
                raise SettingsError(
                    f"ranks.policy is fixed, and {entry.method} moves ranks; set it to tsqlora, or name "
                    "tsqlora-quality-only or lora"
                )

    def require_measured(self, metric: str) -> None:
        """Raises SettingsError for a metric that no cell will have, or that a sweep will miss."""
        task = get_task(self.config.task.type)
        written = TEXT_METRICS if isinstance(task, Generation) else ()
        if metric not in (*task.measured, *written):
            options = nearest(metric, (*task.measured, *written))
            raise SettingsError(f"--metric '{metric}' is not measured for {task.name}; {options}")
        data = self.config.data
        # A directory, or a data set of the hub, may have a test split of its own.
        of_splits = Path(data.train).expanduser().is_dir() or is_hub_id(data.train)
        untested = data.test is None and not of_splits
        if metric in written and (untested or data.format == "text"):
            raise SettingsError(
                f"--metric '{metric}' is of texts that are written on test rows, and there are none that have a text "
                f"to compare with; name data.test, with prompts and targets, or {nearest(metric, task.measured)}"
            )
        if self.sweep and metric in written:
            raise SettingsError(
                f"--metric '{metric}' is not measured on validation rows, by which --lr-sweep chooses; "
                f"{nearest(metric, task.measured)}"
            )

    def rate(self, entry: Entry) -> float:
        """The learning rate that is given for an entry."""
        for name in (entry.name, entry.method):
            if name in self.rates:
                return self.rates[name]
        return self.config.training.learning_rate


@dataclass(slots=True)
class Runner:
    """Runs cells, and tells how far it is."""

    plan: Plan
    metric: str
    run: Run
    progress: Progress | None
    say: Callable[[str], None]
    done: int = 0
    took: list[float] = field(default_factory=list)

    def all(self) -> list[dict[str, Any]]:
        """What every cell found, those of a sweep that were not chosen left out."""
        plan, found = self.plan, list[dict[str, Any]]()
        rates = {entry: plan.rate(entry) for entry in plan.entries}
        for number, seed in enumerate(plan.seeds):
            for entry in plan.entries:
                if number == 0 and plan.sweep:
                    rates[entry] = self._best_rate(entry, seed)
                    best = load(plan.out, Cell(entry, seed, rates[entry]))
                    assert best is not None
                    found.append(best)
                else:
                    found.append(self._cell(Cell(entry, seed, rates[entry])))
        return found

    def _best_rate(self, entry: Entry, seed: int) -> float:
        """By validation: the metric, and where that ties the loss; the smallest where every one failed."""
        worked, sign = dict[float, tuple[float, float]](), -1 if lower_is_better(self.metric) else 1
        for rate in self.plan.sweep:
            found = self._cell(Cell(entry, seed, rate))
            if "failed" not in found:
                metrics = found["metrics"]["validation"]
                worked[rate] = sign * self._measured(metrics, "validation"), -metrics["loss"]
        if not worked:
            return min(self.plan.sweep)  # its failure is the result
        best = max(worked, key=lambda rate: worked[rate])
        lowest, highest = min(self.plan.sweep), max(self.plan.sweep)
        if lowest < highest and best in (lowest, highest):
            side = "highest" if best == highest else "lowest"
            self.say(f"{entry.name}: {best:g} is the {side} rate of --lr-sweep; a better one may lie beyond it")
        return best

    def _cell(self, cell: Cell) -> dict[str, Any]:
        found = load(self.plan.out, cell)
        new = found is None
        begun = time.perf_counter()
        if found is None:
            found = self.run(
                self.plan.config, cell, equal=self.plan.equal, seconds=self._seconds(cell), progress=self.progress
            )
            save(self.plan.out, cell, found)
            self.took.append(time.perf_counter() - begun)
        self.done += 1
        self._tell(cell, found, new=new)
        return found

    def _seconds(self, cell: Cell) -> float | None:
        """With equal seconds, what the first entry took with the first seed; None for that entry itself."""
        first = self.plan.entries[0]
        if self.plan.equal != "seconds" or cell.entry == first:
            return None
        known = [c for c in map(self._stored, self._rates_of(first)) if c is not None and "failed" not in c]
        if not known:
            raise SettingsError(f"{first.name}, whose seconds the others get, failed; name another method first")
        return float(known[0]["seconds"])

    def _rates_of(self, entry: Entry) -> list[float]:
        return list(self.plan.sweep) or [self.plan.rate(entry)]

    def _stored(self, rate: float) -> dict[str, Any] | None:
        return load(self.plan.out, Cell(self.plan.entries[0], self.plan.seeds[0], rate))

    def _measured(self, metrics: Mapping[str, float], split: str) -> float:
        if self.metric not in metrics:
            raise SettingsError(
                f"--metric '{self.metric}' is not measured on {split} rows; {nearest(self.metric, metrics)}"
            )
        return metrics[self.metric]

    def _tell(self, cell: Cell, found: Mapping[str, Any], *, new: bool) -> None:
        total = len(self.plan.entries) * (len(self.plan.seeds) - 1 + max(1, len(self.plan.sweep)))
        if "failed" in found:
            what = f"failed: {found['failed']}"
        else:
            split = "test" if "test" in found["metrics"] else "validation"
            value = self._measured(found["metrics"][split], split)
            what = f"{split} {self.metric} {value:.4f}, {found['seconds']:.0f} s"
        left = (total - self.done) * sum(self.took) / len(self.took) if self.took else 0.0
        when = f"; about {_duration(left)} left" if left and self.done < total else ""
        self.say(f"{self.done}/{total} {cell.name}: {what}{'' if new else ' (known)'}{when}")


def _duration(seconds: float) -> str:
    """
    >>> _duration(4000)
    '1 h 7 min'
    """
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _claim(plan: Plan) -> None:
    """Writes what the directory is for, or checks that it is for the same."""
    about: dict[str, str] = {"equal": plan.equal}
    if plan.equal == "seconds":
        about["seconds_of"] = f"{plan.entries[0].name}, seed {plan.seeds[0]}"
    if (plan.out / CONFIG_FILE).exists():
        if not (plan.out / SETTINGS_FILE).exists():
            raise SettingsError(f"{plan.out} holds a run, and no comparison; name another --out")
        same, known = load_config(plan.out / CONFIG_FILE) == plan.config, _claimed(plan.out / SETTINGS_FILE)
        if same and known["equal"] == plan.equal == "seconds" and known != about:
            raise SettingsError(
                f"cells in {plan.out} have the seconds of {known.get('seconds_of', 'another method')}; name that one "
                "first, or another --out"
            )
        if not same or known != about:
            raise SettingsError(f"{plan.out} holds a comparison with other settings; name another --out")
        return
    write_json(plan.out / SETTINGS_FILE, about)
    write_text(plan.out / CONFIG_FILE, dump_config(plan.config))


def _claimed(path: Path) -> dict[str, str]:
    """What a directory is for.  Raises DataError for a file that is not ours."""
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        known["equal"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not what compare writes ({type(error).__name__}: {error}); name another --out"
        ) from None
    return known
