"""Which cells of bench/results/glue are shown, and what they say together."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import glue
import numpy as np

from tsqlora.compare.methods import entries
from tsqlora.compare.statistics import Interval, interval

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "cola": "CoLA"}
ORDER = tuple(entry.name for entry in entries(glue.ENTRIES.split(",")))
BUSY = ("02d971b", "4c33c59", "42f6d1b", "b914094", "91b3822")
"""The code of cells that ran beside other processes, as many as nine, or were held: their seconds say nothing."""

Cell = Mapping[str, Any]
Block = Mapping[str, Any]
Points = Mapping[str, Mapping[int, float]]
"""Of the metric, by entry and seed."""


# ------------------------------------------------------------------------------ what is shown


def chosen() -> dict[str, Any]:
    """The learning rate of each entry, and the block where they were chosen."""
    return json.loads((glue.RESULTS / "rates.json").read_text())


def sweep() -> list[Cell]:
    """The cells by which learning rates were chosen."""
    path = glue.RESULTS / f"{chosen()['block']}.json"
    return list(json.loads(path.read_text())["cells"].values()) if path.exists() else []


def measured() -> list[Block]:
    """All other blocks with all of their cells, in the order in which they are shown."""
    found = [json.loads(p.read_text()) for p in glue.RESULTS.glob("*_rank*.json") if p.stem != chosen()["block"]]
    tasks = list(TASKS)

    def place(block: Block) -> Any:
        about = block["block"]
        return about["equal"], about["rows"], -about["wrong"], about["mean"], tasks.index(about["task"])

    return sorted(found, key=place)


def blocks() -> list[Block]:
    """The blocks that have cells to show, with those."""
    rates = chosen()["rates"]
    found = [
        {**block, "cells": {name: c for name, c in block["cells"].items() if hidden(c, rates) is None}}
        for block in measured()
    ]
    return [block for block in found if block["cells"]]


def hidden(cell: Cell, rates: Mapping[str, float]) -> str | None:
    """Why a cell is not shown; None for one that is."""
    if glue.stale(cell):
        return "of older code"
    if cell["cell"]["learning_rate"] != rates.get(glue.entry_of(cell)):
        return "at another learning rate than is chosen now"
    return None


def kinds(found: Iterable[Block]) -> list[tuple[Any, ...]]:
    """What the blocks of several tasks have in common."""
    return list(dict.fromkeys(kind_of(block) for block in found))


def kind_of(block: Block) -> tuple[Any, ...]:
    about = block["block"]
    return about["equal"], about["rows"], about["wrong"], about["mean"]


def rank_of(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER)), name


# --------------------------------------------------------------------------- what a block says


def by_entry(block: Block) -> dict[str, list[Cell]]:
    """The cells of each entry, failed ones too."""
    found = dict[str, list[Cell]]()
    for cell in block["cells"].values():
        found.setdefault(glue.entry_of(cell), []).append(cell)
    return {name: sorted(found[name], key=seed_of) for name in sorted(found, key=rank_of)}


def points(block: Block) -> dict[str, dict[int, float]]:
    """Points of the metric on test rows, by entry and seed; an entry of which every seed failed has none."""
    metric = block["block"]["metric"]
    return {
        name: {seed_of(c): 100 * c["metrics"]["test"][metric] for c in worked(cells)}
        for name, cells in by_entry(block).items()
    }


def seed_of(cell: Cell) -> int:
    return cell["cell"]["seed"]


def worked(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if "failed" not in cell]


def quiet(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose seconds mean something."""
    return [cell for cell in cells if commit_of(cell) not in BUSY]


def commit_of(cell: Cell) -> str:
    return (cell["commit"] or "unknown")[:7]


def passes(cell: Cell) -> int:
    """Rows forward, and twice for rows backward, evaluation left out."""
    return sum(c["forward"] + 2 * c["backward"] for phase, c in cell["cost"].items() if phase != "evaluation")


def at_random(cell: Cell) -> bool:
    """Whether rows that were to be chosen by scores were drawn as the random control draws them."""
    quality = cell.get("quality", {})
    if "random" in quality:
        return quality["random"] is not None
    # Before 42f6d1b cells did not tell; what `quality` left out is what is evident.
    return quality.get("scored", False) and not (quality["noise"] or {}).get("evident")


def trainable(cell: Cell) -> int:
    return cell["parameters"]["trainable"]


# ------------------------------------------------------------------------- what tasks say together


class Over(NamedTuple):
    """A difference over tasks: by seed its mean over the tasks that both sides have."""

    tasks: list[str]
    seeds: Interval | None
    """None where no seed has all of the tasks."""
    worst: float | None
    """Of all tasks and those seeds."""


def over(of: Mapping[str, Points], name: str, other: str) -> Over:
    """One entry minus another, of points by task.

    Seeds are draws, tasks are not: the interval is over seeds, each the mean over the same tasks.

    >>> over({"sst2": {"eva+all": {0: 81.0, 1: 83.0}, "lora+all": {0: 80.0, 1: 80.0}}}, "eva+all", "lora+all").worst
    1.0
    """
    tasks = [task for task in of if of[task].get(name) and of[task].get(other)]
    if not tasks or name == other:
        return Over([], None, None)
    seeds = set.intersection(*(of[task][name].keys() & of[task][other].keys() for task in tasks))
    if not seeds:
        return Over(tasks, None, None)
    found = [[of[task][name][seed] - of[task][other][seed] for task in tasks] for seed in sorted(seeds)]
    return Over(tasks, interval([float(np.mean(of_seed)) for of_seed in found]), min(map(min, found)))


def of_kind(found: Sequence[Block], kind: tuple[Any, ...]) -> dict[str, Block]:
    """The kind's blocks by task."""
    return {block["block"]["task"]: block for block in found if kind_of(block) == kind}
