"""A comparison's table in a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tsqlora.reports.comparison import CHOSEN_ON_SHOWN, counted, short


def show_comparison(console: Console, result: Mapping[str, Any]) -> None:
    """Print a comparison: one table of results, one of costs."""
    metric, rows = result["metric"], result["table"]
    split = next((row["split"] for row in rows if "split" in row), "test")
    seeds = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''}"
    title = f"{split} {metric} at equal {result['equal']}, mean ± 95 % interval over {seeds}"
    table = Table("", metric, "difference", "verdict", title=title, title_justify="left")
    cost = Table("", "seconds", "steps", "trainable", "MiB", title="cost", title_justify="left")
    for row in rows:
        remarks = [f"{len(row['failed'])} failed"] if row["failed"] else []
        if random := row.get("random"):
            remarks.append(f"{len(random)} of {len(row['seeds'])} seeds drew at random")
        name = f"{row['name']} ({'; '.join(remarks)})" if remarks else row["name"]
        if "metrics" not in row:
            table.add_row(name, "–", "–", row["verdict"])
            continue
        difference = _number(row["difference"], sign="+") if row.get("difference") else "–"
        table.add_row(name, _number(row["metrics"][metric]), difference, row["verdict"])
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}"
        trainable = counted(row["trainable_mean"], *row["trainable_range"])
        cost.add_row(name, f"{row['seconds']['mean']:.0f}", f"{row['steps']:,}", trainable, memory)
    console.print(table)
    console.print(cost)
    for name, values in result.get("differing", {}).items():
        several = ", ".join(map(short, values) if name == "commit" else values)
        console.print(f"runs differ in {name}: {several}; choose another --out to run all again", soft_wrap=True)
    if result.get("sweep") and split == "validation":
        console.print(CHOSEN_ON_SHOWN, soft_wrap=True)
    console.print(f"runs {result['out']}", soft_wrap=True, highlight=False, markup=False)


def _number(value: Mapping[str, Any], sign: str = "") -> str:
    shown = f"{value['mean']:{sign}.4f}"
    return shown if value["half"] is None else f"{shown} ± {value['half']:.4f}"
