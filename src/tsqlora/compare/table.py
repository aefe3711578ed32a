"""Statistics over cells: means over seeds, paired differences from plain LoRA, and the printed table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import scipy.stats
from rich.console import Console
from rich.table import Table

from tsqlora.compare.cells import Entry
from tsqlora.reports.comparison import CHOSEN_ON_SHOWN, Mean, counted, short
from tsqlora.reports.metrics import lower_is_better

Result = Mapping[str, Any]
CONFIDENCE = 0.95
FEWEST = 3
"""Seeds that a verdict needs: one or two may agree by chance."""


def interval(values: Sequence[float]) -> Mean:
    """Student's t-interval of the mean of at least one value.

    >>> interval([1.0, 2.0, 3.0])
    Mean(mean=2.0, half=2.484..., n=3)
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Mean(mean, None, n)
    # Not ttest_rel's interval: it warns if all values are equal, as for runs with the same draws.
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * scipy.stats.sem(values)
    return Mean(mean, float(half), n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """The paired difference, ours minus theirs, over common seeds; None if there are none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def verdict(difference: Mean | None, other: str, *, lower_is_better: bool = False) -> str:
    """The difference in words.

    >>> verdict(Mean(0.02, 0.03, 3), "lora")
    'within noise of lora'
    >>> verdict(Mean(0.05, 0.03, 3), "lora")
    'better than lora'
    >>> verdict(Mean(0.05, 0.03, 3), "lora", lower_is_better=True)
    'worse than lora'
    """
    if difference is None:
        return f"no seed in common with {other}"
    if difference.half is None or difference.n < FEWEST:
        return f"{difference.n} seed{'s' if difference.n > 1 else ''}: too few to tell from {other}"
    if abs(difference.mean) <= difference.half:
        return f"within noise of {other}"
    return f"{'better' if (difference.mean > 0) != lower_is_better else 'worse'} than {other}"


def rows_of(entries: Sequence[Entry], results: Sequence[Result], *, metric: str) -> list[dict[str, Any]]:
    """One row an entry, in their order: metrics, cost, and the difference from LoRA in the metric.

    Test rows count if there are any, else validation rows. A failed seed counts only in `failed`.
    """
    of = {entry: [r for r in results if _entry(r) == entry] for entry in entries}
    against = reference(entries)
    theirs = _by_seed(of[against], metric)
    return [_row(entry, of[entry], against, theirs, metric) for entry in entries]


def reference(entries: Sequence[Entry]) -> Entry:
    """The entry that others are compared with: LoRA on all rows, else LoRA, else the first."""
    loras = [entry for entry in entries if entry.method == "lora"]
    return next((entry for entry in loras if entry.policy == "all"), (loras or list(entries))[0])


def _row(
    entry: Entry, results: Sequence[Result], against: Entry, theirs: Mapping[int, float], metric: str
) -> dict[str, Any]:
    worked = [r for r in results if "failed" not in r]
    row: dict[str, Any] = {
        "name": entry.name,
        **asdict(entry),
        "seeds": [r["cell"]["seed"] for r in worked],
        "failed": [r["cell"]["seed"] for r in results if "failed" in r],
        "random": [r["cell"]["seed"] for r in worked if r.get("quality", {}).get("random")],
        "learning_rates": sorted({r["cell"]["learning_rate"] for r in results}),
    }
    if not worked:
        return row | {"verdict": "every seed failed"}
    split, trainable = measured_on(worked[0]), [r["parameters"]["trainable"] for r in worked]
    names = worked[0]["metrics"][split]
    row |= {
        "split": split,
        "metrics": {name: interval([r["metrics"][split][name] for r in worked])._asdict() for name in names},
        "seconds": interval([r["seconds"] for r in worked])._asdict(),
        "steps": max(r["steps"] for r in worked),
        "trainable": max(trainable),
        "trainable_mean": math.fsum(trainable) / len(trainable),
        "trainable_range": [min(trainable), max(trainable)],
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in worked),
    }
    if entry == against:
        return row | {"verdict": "the reference"}
    difference = paired(_by_seed(worked, metric), theirs)
    return row | {
        "difference": None if difference is None else difference._asdict(),
        "verdict": verdict(difference, against.name, lower_is_better=lower_is_better(metric)),
    }


def differing(results: Iterable[Result]) -> dict[str, list[str]]:
    """How cells were made, if not all alike: commits, versions of libraries, and the precision.

    >>> differing([{"commit": "a", "bf16": True}, {"commit": "b", "bf16": False}])
    {'commit': ['a', 'b'], 'precision': ['bfloat16', 'float32']}
    """
    values: dict[str, set[str]] = {}
    for cell in results:
        made_by = {"commit": cell.get("commit") or "an installed package", **cell.get("versions", {})}
        if "bf16" in cell:  # a failed cell may lack it
            made_by["precision"] = "bfloat16" if cell["bf16"] else "float32"
        for name, value in made_by.items():
            values.setdefault(name, set()).add(str(value))
    return {name: sorted(several) for name, several in values.items() if len(several) > 1}


def named(row: Mapping[str, Any]) -> str:
    """The name of a row, with failed seeds and seeds that drew at random.

    >>> named({"name": "adalora+quality", "seeds": [0, 1, 2], "failed": [], "random": [0, 2]})
    'adalora+quality (2 of 3 seeds drew at random)'
    """
    remarks = [f"{len(row['failed'])} failed"] if row["failed"] else []
    if random := row.get("random"):
        remarks.append(f"{len(random)} of {len(row['seeds'])} seeds drew at random")
    return f"{row['name']} ({'; '.join(remarks)})" if remarks else row["name"]


def measured_on(result: Result) -> str:
    """The split that a cell's table row uses."""
    return "test" if "test" in result["metrics"] else "validation"


def _entry(result: Result) -> Entry:
    return Entry(result["cell"]["method"], result["cell"]["policy"])


def _by_seed(results: Sequence[Result], metric: str) -> dict[int, float]:
    return {r["cell"]["seed"]: r["metrics"][measured_on(r)][metric] for r in results if "failed" not in r}


def show_comparison(console: Console, result: Result) -> None:
    """Print a comparison: one table of results, one of costs."""
    metric, rows = result["metric"], result["table"]
    split = next((row["split"] for row in rows if "split" in row), "test")
    seeds = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''}"
    title = f"{split} {metric} at equal {result['equal']}, mean ± 95 % interval over {seeds}"
    table = Table("", metric, "difference", "verdict", title=title, title_justify="left")
    cost = Table("", "seconds", "steps", "trainable", "MiB", title="cost", title_justify="left")
    for row in rows:
        name = named(row)
        if "metrics" not in row:
            table.add_row(name, "–", "–", row["verdict"])
            continue
        difference = _number(row["difference"], sign="+") if row.get("difference") else "–"
        table.add_row(name, _number(row["metrics"][metric]), difference, row["verdict"])
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}"
        trainable = counted(row.get("trainable_mean", row["trainable"]), row.get("trainable_range"))
        cost.add_row(name, f"{row['seconds']['mean']:.0f}", f"{row['steps']:,}", trainable, memory)
    console.print(table)
    console.print(cost)
    for name, values in result.get("differing", {}).items():
        several = ", ".join(map(short, values) if name == "commit" else values)
        console.print(f"cells differ in {name}: {several}; choose another --out to run all again", soft_wrap=True)
    if result.get("sweep") and split == "validation":
        console.print(CHOSEN_ON_SHOWN, soft_wrap=True)
    console.print(f"cells   {result['out']}/cells", soft_wrap=True, highlight=False, markup=False)
    if result.get("report"):
        console.print(f"report  {result['report']}", soft_wrap=True, highlight=False, markup=False)


def _number(value: Mapping[str, Any], sign: str = "") -> str:
    shown = f"{value['mean']:{sign}.4f}"
    return shown if value["half"] is None else f"{shown} ± {value['half']:.4f}"
