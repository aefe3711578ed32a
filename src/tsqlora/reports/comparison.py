"""Read a comparison's directory for its report, from JSON only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tsqlora.errors import DataError
from tsqlora.files import reading

# compare/ imports these names, since a report must not import compare/.
SETTINGS_FILE, TABLE_FILE, CELLS_DIR = "comparison.json", "table.json", "cells"
CHOSEN_ON_SHOWN = (
    "There are no test rows: the first seed's numbers come from the validation rows that chose its learning rate, so "
    "they are the best of several. Set data.test for an independent measure."
)


class Mean(NamedTuple):
    """A mean over n seeds and the half width of its 95 % interval; None for one seed."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Trained:
    """One successful training: a method with one seed."""

    seed: int
    metrics: dict[str, float]
    phases: dict[str, float]
    passes: int
    """Rows forward plus twice the rows backward: cost, whatever the machine."""
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """Results of a method with a row policy, by seed and in the mean.

    A method has no means if every seed failed. `difference` is from the reference; None for the reference itself and
    without a common seed.
    """

    name: str
    verdict: str
    metrics: dict[str, Mean]
    difference: Mean | None
    steps: int
    trainable: str
    """The mean count, with the range if seeds differ."""
    memory: int
    learning_rates: list[float]
    trained: list[Trained]
    failed: dict[int, str]
    at_random: dict[int, str]
    """By seed, why rows were drawn at random although the policy scores."""

    @property
    def seconds(self) -> float:
        """Mean over seeds, as for `passes` and `phases`."""
        return sum(trained.seconds for trained in self.trained) / len(self.trained)

    @property
    def passes(self) -> float:
        return sum(trained.passes for trained in self.trained) / len(self.trained)

    @property
    def phases(self) -> dict[str, float]:
        names = dict.fromkeys(phase for trained in self.trained for phase in trained.phases)
        return {name: sum(t.phases.get(name, 0.0) for t in self.trained) / len(self.trained) for name in names}

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric by seed, without failed seeds."""
        return {trained.seed: trained.metrics[metric] for trained in self.trained}


@dataclass(frozen=True, slots=True)
class Tried:
    """A learning rate of a sweep with its validation metric."""

    method: str
    rate: float
    value: float | None
    chosen: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """All values of a page. `sweep_rates` and `rates` are the command's learning rates."""

    name: str
    metric: str
    split: str
    equal: str
    seeds: list[int]
    methods: list[Method]
    reference: Method
    sweep: list[Tried]
    sweep_rates: list[float]
    rates: dict[str, float]
    task: str
    settings: dict[str, Any]
    versions: dict[str, str]
    commits: list[str]
    chosen_on_shown: bool
    """Whether the shown rows also chose the learning rates."""
    data: list[str]
    precisions: list[str]
    """Precisions of the trainings, if recorded."""

    @property
    def worked(self) -> list[Method]:
        """Methods with at least one successful seed."""
        return [method for method in self.methods if method.trained]

    @property
    def others(self) -> list[Method]:
        """Successful methods other than the reference."""
        return [method for method in self.worked if method is not self.reference]


def counted(mean: float, between: Sequence[int] | None) -> str:
    """A mean count over seeds, with minimum and maximum if they differ.

    >>> counted(1010.0, [1000, 1020]), counted(1000.0, [1000, 1000])
    ('1,010 (1,000 to 1,020)', '1,000')
    """
    low, high = between or (0, 0)
    return f"{mean:,.0f} ({low:,} to {high:,})" if low != high else f"{mean:,.0f}"


def short(commit: str) -> str:
    """
    >>> short("0123456789abcdef-dirty")
    '0123456789ab-dirty'
    """
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def is_comparison(directory: Path) -> bool:
    """Whether the directory belongs to `tsqlora compare`."""
    return (directory / SETTINGS_FILE).exists() or (directory / TABLE_FILE).exists()


def gather_comparison(directory: Path) -> Comparison:
    """Read table.json and its cells.  Raises DataError if the comparison is incomplete or damaged."""
    for path in (directory / TABLE_FILE, *(directory / CELLS_DIR).glob("*.json")):
        reading(path)
    try:
        table = _read(directory / TABLE_FILE)
        cells = [_read(path) for path in sorted((directory / CELLS_DIR).glob("*.json"))]
        return _comparison(directory.resolve().name, table, cells)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{directory}: {TABLE_FILE} or {CELLS_DIR} is missing or damaged ({type(error).__name__}: {error}); "
            "run its compare command again"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _comparison(name: str, table: Mapping[str, Any], cells: list[dict[str, Any]]) -> Comparison:
    rows, metric = table["table"], table["metric"]
    shown = [[cell for cell in cells if _is_of(cell["cell"], row)] for row in rows]
    for row, of_row in zip(rows, shown, strict=True):
        if not of_row:
            raise LookupError(f"{CELLS_DIR} has no file of {row['name']}")
    every = [cell for of_row in shown for cell in of_row]
    versions: dict[str, set[str]] = {}
    for cell in every:
        for library, version in cell.get("versions", {}).items():
            versions.setdefault(library, set()).add(str(version))
    sweep = _sweep(rows, cells, metric, table["seeds"], table["sweep"])
    methods = [_method(row, of_row) for row, of_row in zip(rows, shown, strict=True)]
    return Comparison(
        name=name,
        metric=metric,
        split=next((row["split"] for row in rows if "split" in row), "test"),
        equal=table["equal"],
        seeds=list(table["seeds"]),
        methods=methods,
        reference=next((method for method in methods if method.verdict == "the reference"), methods[0]),
        sweep=sweep,
        sweep_rates=list(table["sweep"]),
        rates=dict(table["rates"]),
        task=str(every[0].get("task", "")),
        settings=dict(every[0].get("settings", {})),
        versions={library: ", ".join(sorted(numbers)) for library, numbers in versions.items()},
        commits=sorted({cell["commit"] for cell in every if cell.get("commit")}),
        chosen_on_shown=bool(sweep) and not any("test" in cell.get("metrics", {}) for cell in every),
        data=sorted({cell["data_hash"] for cell in every if cell.get("data_hash")}),
        precisions=sorted({"bfloat16" if cell["bf16"] else "float32" for cell in every if "bf16" in cell}),
    )


def _is_of(cell: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row of the table includes a cell."""
    same = (cell["method"], cell["policy"]) == (row["method"], row["policy"])
    return same and cell["seed"] in (*row["seeds"], *row["failed"]) and cell["learning_rate"] in row["learning_rates"]


def _method(row: Mapping[str, Any], cells: list[dict[str, Any]]) -> Method:
    return Method(
        name=row["name"],
        verdict=row["verdict"],
        metrics={name: Mean(**value) for name, value in row.get("metrics", {}).items()},
        difference=Mean(**row["difference"]) if row.get("difference") else None,
        steps=row.get("steps", 0),
        trainable=counted(row.get("trainable_mean", row.get("trainable", 0)), row.get("trainable_range")),
        memory=row.get("peak_memory_bytes", 0),
        learning_rates=list(row["learning_rates"]),
        trained=sorted((_trained(c, row["split"]) for c in cells if "failed" not in c), key=lambda t: t.seed),
        failed={c["cell"]["seed"]: str(c["failed"]) for c in cells if "failed" in c},
        at_random={c["cell"]["seed"]: str(why) for c in cells if (why := c.get("quality", {}).get("random"))},
    )


def _trained(cell: Mapping[str, Any], split: str) -> Trained:
    cost = {phase: value for phase, value in cell.get("cost", {}).items() if phase != "evaluation"}
    return Trained(
        seed=cell["cell"]["seed"],
        metrics=dict(cell["metrics"][split]),
        phases={phase: value["seconds"] for phase, value in cost.items()},
        passes=sum(value["forward"] + 2 * value["backward"] for value in cost.values()),
        seconds=cell["seconds"],
        notes=tuple(map(str, cell.get("notes", ()))),
    )


def _sweep(
    rows: list[Any], cells: list[dict[str, Any]], metric: str, seeds: list[int], rates: Sequence[float]
) -> list[Tried]:
    """Every learning rate of the sweep with the first seed.

    Empty if no method had a choice: an earlier command may have left cells at other rates.
    """
    tried: list[Tried] = []
    for row in rows:
        of = [c for c in cells if (c["cell"]["method"], c["cell"]["policy"]) == (row["method"], row["policy"])]
        for cell in sorted(of, key=lambda c: c["cell"]["learning_rate"]):
            rate = cell["cell"]["learning_rate"]
            if cell["cell"]["seed"] == seeds[0] and rate in rates:
                value = cell["metrics"].get("validation", {}).get(metric)
                tried.append(Tried(row["name"], rate, value, rate in row["learning_rates"]))
    return tried if len(tried) > len({t.method for t in tried}) else []
