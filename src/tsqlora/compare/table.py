"""What cells say together: means over seeds, and differences by seed from plain LoRA."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tsqlora.compare.cells import Entry
from tsqlora.compare.statistics import Interval, interval, paired, verdict
from tsqlora.reports.comparison import CHOSEN_ON_SHOWN, counted, short
from tsqlora.reports.metrics import lower_is_better

Found = Mapping[str, Any]


def rows_of(entries: Sequence[Entry], found: Sequence[Found], *, metric: str) -> list[dict[str, Any]]:
    """One row an entry, in their order: metrics, cost, and the difference from LoRA in the metric.

    Measured on test rows where there are any, else on validation rows. A seed that failed counts only in `failed`.
    """
    of = {entry: [f for f in found if _entry(f) == entry] for entry in entries}
    against = reference(entries)
    theirs = _by_seed(of[against], metric)
    return [_row(entry, of[entry], against, theirs, metric) for entry in entries]


def reference(entries: Sequence[Entry]) -> Entry:
    """What others are compared with: LoRA on all rows, else LoRA, else the first."""
    loras = [entry for entry in entries if entry.method == "lora"]
    return next((entry for entry in loras if entry.policy == "all"), (loras or list(entries))[0])


def _row(
    entry: Entry, found: Sequence[Found], against: Entry, theirs: Mapping[int, float], metric: str
) -> dict[str, Any]:
    worked = [f for f in found if "failed" not in f]
    row: dict[str, Any] = {
        "name": entry.name,
        **asdict(entry),
        "seeds": [f["cell"]["seed"] for f in worked],
        "failed": [f["cell"]["seed"] for f in found if "failed" in f],
        "random": [f["cell"]["seed"] for f in worked if f.get("quality", {}).get("random")],
        "learning_rates": sorted({f["cell"]["learning_rate"] for f in found}),
    }
    if not worked:
        return row | {"verdict": "every seed failed"}
    split, trainable = measured_on(worked[0]), [f["parameters"]["trainable"] for f in worked]
    row |= {
        "split": split,
        "metrics": {
            name: _told(interval([f["metrics"][split][name] for f in worked])) for name in worked[0]["metrics"][split]
        },
        "seconds": _told(interval([f["seconds"] for f in worked])),
        "steps": max(f["steps"] for f in worked),
        "trainable": max(trainable),
        "trainable_mean": math.fsum(trainable) / len(trainable),
        "trainable_range": [min(trainable), max(trainable)],
        "peak_memory_bytes": max(f["peak_memory_bytes"] for f in worked),
    }
    if entry == against:
        return row | {"verdict": "the reference"}
    difference = paired(_by_seed(worked, metric), theirs)
    return row | {
        "difference": None if difference is None else _told(difference),
        "verdict": verdict(difference, against.name, lower_is_better=lower_is_better(metric)),
    }


def differing(found: Iterable[Found]) -> dict[str, list[str]]:
    """How cells were made, where it is not the same for all: commits, versions of libraries, and the precision.

    The last one follows the machine, where settings leave it open.

    >>> differing([{"commit": "a", "bf16": True}, {"commit": "b", "bf16": False}])
    {'commit': ['a', 'b'], 'precision': ['bfloat16', 'float32']}
    """
    known: dict[str, set[str]] = {}
    for cell in found:
        made_by = {"commit": cell.get("commit") or "an installed package", **cell.get("versions", {})}
        if "bf16" in cell:  # a failed cell may have none
            made_by["precision"] = "bfloat16" if cell["bf16"] else "float32"
        for name, value in made_by.items():
            known.setdefault(name, set()).add(str(value))
    return {name: sorted(values) for name, values in known.items() if len(values) > 1}


def named(row: Mapping[str, Any]) -> str:
    """The name of a row, with what a reader of its numbers must know.

    >>> named({"name": "adalora+quality", "seeds": [0, 1, 2], "failed": [], "random": [0, 2]})
    'adalora+quality (2 of 3 seeds drew at random)'
    """
    said = [f"{len(row['failed'])} failed"] if row["failed"] else []
    if random := row.get("random"):
        said.append(f"{len(random)} of {len(row['seeds'])} seeds drew at random")
    return f"{row['name']} ({'; '.join(said)})" if said else row["name"]


def measured_on(found: Found) -> str:
    """The split that a cell's table row is measured on."""
    return "test" if "test" in found["metrics"] else "validation"


def _entry(found: Found) -> Entry:
    return Entry(found["cell"]["method"], found["cell"]["policy"])


def _by_seed(found: Sequence[Found], metric: str) -> dict[int, float]:
    return {f["cell"]["seed"]: f["metrics"][measured_on(f)][metric] for f in found if "failed" not in f}


def _told(value: Interval) -> dict[str, Any]:
    return {"mean": value.mean, "half": value.half, "n": value.n}


def show_comparison(console: Console, result: Mapping[str, Any]) -> None:
    """The tables of a comparison: what came of it, and what it cost."""
    metric, rows = result["metric"], result["table"]
    split = next((row["split"] for row in rows if "split" in row), "test")
    seeds = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''}"
    title = f"{split} {metric} at equal {result['equal']}, mean ± 95 % interval over {seeds}"
    found = Table("", metric, "difference", "which is", title=title, title_justify="left")
    cost = Table("", "seconds", "steps", "trainable", "MiB", title="cost", title_justify="left")
    for row in rows:
        name = named(row)
        if "metrics" not in row:
            found.add_row(name, "–", "–", row["verdict"])
            continue
        difference = _number(row["difference"], sign="+") if row.get("difference") else "–"
        found.add_row(name, _number(row["metrics"][metric]), difference, row["verdict"])
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}"
        cost.add_row(name, f"{row['seconds']['mean']:.0f}", f"{row['steps']:,}", _trainable(row), memory)
    console.print(found)
    console.print(cost)
    for name, values in result.get("differing", {}).items():
        told = ", ".join(map(short, values) if name == "commit" else values)
        console.print(f"cells were not made alike: {name} {told}; another --out makes all anew", soft_wrap=True)
    if result.get("sweep") and split == "validation":
        console.print(CHOSEN_ON_SHOWN, soft_wrap=True)
    console.print(f"cells are in {result['out']}/cells", soft_wrap=True, highlight=False, markup=False)
    if result.get("report"):
        console.print(f"plots and all numbers: {result['report']}", soft_wrap=True, highlight=False, markup=False)


def _trainable(row: Mapping[str, Any]) -> str:
    """The mean, and where seeds differ how far: ranks decide it, and rows decide ranks."""
    return counted(row.get("trainable_mean", row["trainable"]), row.get("trainable_range"))


def _number(value: Mapping[str, Any], sign: str = "") -> str:
    shown = f"{value['mean']:{sign}.4f}"
    return shown if value["half"] is None else f"{shown} ± {value['half']:.4f}"
