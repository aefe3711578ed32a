"""The stored cells of bench/glue.py as one table, and differences between ways to train."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import glue
import pandas as pd

from tsqlora.compare.methods import entries
from tsqlora.compare.table import interval
from tsqlora.reports.comparison import Mean

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "cola": "CoLA"}
ORDER = tuple(entry.name for entry in entries(glue.ENTRIES.split(",")))
REFERENCES = ("lora+all", "lora+random")
KIND = ["equal", "rows", "wrong", "mean"]
"""What blocks of several tasks have in common."""
BLOCK = [*KIND, "task"]
FLOAT32 = "glue_float32.json"
"""Beside the results' folder: cells that were made again on a machine without bfloat16."""
WIDE = ["points", "loss", "seconds", "bf16", "commit"]
"""What a cell has of its float32 twin, under the name with `_wide`."""
BUSY = (
    *("02d971b", "4c33c59", "42f6d1b", "b914094", "91b3822", "5c3ccf2"),
    *("5fd218a", "13ca355", "fc60900", "c47e939", "ef3f0c2", "1351d73"),
)
"""Commits of cells that ran beside other processes, as many as nine, or were held: their seconds mean nothing."""


def chosen() -> dict[str, Any]:
    """The learning rate of each entry, and the block where they were chosen."""
    return json.loads((glue.RESULTS / "rates.json").read_text())


def stored() -> pd.DataFrame:
    """Every cell of every complete block, the sweep's too; `hidden` says why a cell is not shown, else None."""
    swept, rows = chosen()["block"], list[dict[str, Any]]()
    for path in glue.RESULTS.glob("*_rank*.json"):
        block = json.loads(path.read_text())
        for cell in block["cells"].values():
            row = _row(block["block"], cell)
            hidden = "of older code" if row["stale"] else None
            if not hidden and row["rate"] != glue.rates_of(block).get(row["entry"]):
                hidden = "at another learning rate than is chosen now"
            sweep = path.stem == swept or ("rates" in block and row["seed"] == glue.CHOOSING)
            rows.append(row | {"sweep": sweep, "hidden": hidden, "own_rates": block.get("rates")})
    wide = pd.DataFrame(_float32(), columns=[*BLOCK, "entry", "seed", *WIDE]).set_index([*BLOCK, "entry", "seed"])
    return _sorted(pd.DataFrame(rows)).join(wide.add_suffix("_wide"), on=wide.index.names)


def shown(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the grid that the page and README show."""
    return cells[~cells["sweep"] & cells["hidden"].isna()]


def _float32() -> list[dict[str, Any]]:
    """Cells that were made again on a machine without bfloat16."""
    path = glue.RESULTS.parent / FLOAT32
    blocks = json.loads(path.read_text())["blocks"] if path.exists() else {}
    about = {file.stem: json.loads(file.read_text())["block"] for file in glue.RESULTS.glob("*_rank*.json")}
    return [_row(about[name], cell) for name, cells in blocks.items() if name in about for cell in cells.values()]


def _row(block: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a cell; test metrics in points."""
    metrics, cost = cell["metrics"], {k: c for k, c in cell["cost"].items() if k != "evaluation"}
    test, validation = metrics.get("test", {}), metrics.get("validation", {})
    commit = (cell["commit"] or "unknown")[:7]
    return {
        **{name: block[name] for name in (*BLOCK, "metric")},
        "entry": glue.entry_of(cell),
        "seed": cell["cell"]["seed"],
        "rate": cell["cell"]["learning_rate"],
        "failed": "failed" in cell,
        "points": 100 * test[block["metric"]] if test else None,
        "loss": test.get("loss"),
        "validation": 100 * validation[block["metric"]] if block["metric"] in validation else None,
        "seconds": None if commit in BUSY else cell["seconds"],
        "trainable": cell.get("parameters", {}).get("trainable"),
        "passes": sum(c["forward"] + 2 * c["backward"] for c in cost.values()),
        "samples": sum(cost[phase]["backward"] for phase in ("warm-up", "training") if phase in cost),
        "random": _at_random(cell.get("quality", {})),
        "bf16": cell.get("bf16", True),  # cells before this was recorded had bfloat16
        "commit": commit,
        "stale": glue.stale(cell),
    }


def _at_random(quality: Mapping[str, Any]) -> bool:
    """Whether rows that scores were to choose were drawn as the random control draws them."""
    if "random" in quality:
        return quality["random"] is not None
    # Cells before 42f6d1b do not say; rows are left out only where wrong labels are evident.
    return quality.get("scored", False) and not (quality["noise"] or {}).get("evident")


def _sorted(cells: pd.DataFrame) -> pd.DataFrame:
    """In the order of the page: equal steps first, wrong labels first, then tasks, entries and seeds."""
    place = {"task": list(TASKS).index, "entry": rank_of, "equal": lambda e: (e != "steps", e), "wrong": lambda w: -w}
    key = lambda column: column.map(place[column.name]) if column.name in place else column  # noqa: E731
    return cells.sort_values([*BLOCK, "entry", "seed"], key=key, kind="stable").reset_index(drop=True)


def rank_of(entry: str) -> tuple[int, str]:
    return (ORDER.index(entry) if entry in ORDER else len(ORDER)), entry


def beside(cells: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each cell that worked beside the reference's of the same block and seed, where there is one.

    Adds `gain` in points, `loss_share` in percent, `time_share`, and the reference's commit and precision. A float32
    cell is compared with the reference's float32 cell where that was made in both.
    """
    keys = [*BLOCK, "seed"]
    worked = cells[~cells["failed"]]
    pairs = worked.merge(worked[worked["entry"] == reference], on=keys, suffixes=("", "_theirs"))
    twin = ~pairs["bf16"] & pairs["points_wide_theirs"].notna()
    for column in WIDE:
        pairs[f"{column}_theirs"] = pairs[f"{column}_theirs"].mask(twin, pairs[f"{column}_wide_theirs"])
    return pairs.assign(
        gain=pairs["points"] - pairs["points_theirs"],
        loss_share=100 * (pairs["loss"] / pairs["loss_theirs"] - 1),
        time_share=pairs["seconds"] / pairs["seconds_theirs"],
        mixed=pairs["bf16"] != pairs["bf16_theirs"],
    )


class Over(NamedTuple):
    """A difference over tasks: by seed its mean over the tasks that both sides have."""

    tasks: list[str]
    seeds: Mean | None
    """None where no seed has all of the tasks."""
    worst: float | None
    """The lowest of one task and seed among them."""


def over(cells: pd.DataFrame, entry: str, reference: str, what: str = "gain") -> Over:
    """One entry minus another, of blocks of one kind.

    Seeds are draws, tasks are not: the interval is over seeds, each the mean over the same tasks.
    """
    worked = cells[~cells["failed"]]
    both = [set(worked.loc[worked["entry"] == name, "task"]) for name in (entry, reference)]
    tasks = [task for task in TASKS if task in both[0] & both[1]]
    if not tasks or entry == reference:
        return Over([], None, None)
    pairs = beside(cells, reference)
    table = pairs[pairs["entry"] == entry].pivot(index="seed", columns="task", values=what)
    table = table.reindex(columns=tasks).dropna()
    if table.empty:
        return Over(tasks, None, None)
    return Over(tasks, interval([*table.mean(axis=1)]), float(table.min().min()))


def entries_of(cells: pd.DataFrame) -> Iterable[str]:
    return sorted(cells["entry"].unique(), key=rank_of)
