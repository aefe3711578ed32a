"""Which cells of bench/results/glue are shown, and what they say together."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import glue
import numpy as np

from tsqlora.compare.methods import entries
from tsqlora.compare.statistics import Interval, interval

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "cola": "CoLA"}
ORDER = tuple(entry.name for entry in entries(glue.ENTRIES.split(",")))
BUSY = (
    *("02d971b", "4c33c59", "42f6d1b", "b914094", "91b3822", "5c3ccf2"),
    *("5fd218a", "13ca355", "fc60900", "c47e939", "ef3f0c2", "1351d73"),
)
"""The code of cells that ran beside other processes, as many as nine, or were held: their seconds say nothing."""

Cell = Mapping[str, Any]
Block = Mapping[str, Any]
What = Callable[[Block, str, str], Mapping[int, float]]
"""Of a block and two of its entries, by seed: `differences` or `loss_shares`."""
FLOAT32 = "glue_float32.json"
"""Beside the results' folder: cells that were made again on a machine without bfloat16."""


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
        task = tasks.index(about["task"])
        return about["equal"] != "steps", about["equal"], about["rows"], -about["wrong"], about["mean"], task

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


def pairs(block: Block, name: str, other: str) -> dict[int, tuple[Cell, Cell]]:
    """An entry's cell and another's of each seed that both have; of one precision where the other was made in both."""
    of, again = by_entry(block), in_float32_too(block)
    theirs = {seed_of(cell): cell for cell in worked(of.get(other, ()))}
    found = {}
    for cell in worked(of.get(name, ())):
        if (seed := seed_of(cell)) in theirs:
            beside = theirs[seed] if is_bf16(cell) else again.get((other, seed), theirs[seed])
            found[seed] = (cell, beside)
    return found


def in_float32_too(block: Block) -> dict[tuple[str, int], Cell]:
    """Cells that were made again on a machine without bfloat16, by entry and seed."""
    path = glue.RESULTS.parent / FLOAT32
    of = json.loads(path.read_text())["blocks"] if path.exists() else {}
    plain = {name: value for name, value in block["block"].items() if name != "metric"}
    return {(glue.entry_of(cell), seed_of(cell)): cell for cell in of.get(glue.Block(**plain).name, {}).values()}


def is_bf16(cell: Cell) -> bool:
    """A cell of before that was told had bfloat16."""
    return cell.get("bf16", True)


def differences(block: Block, name: str, other: str) -> dict[int, float]:
    """One entry minus another in points of the metric on test rows, by seed."""
    metric = block["block"]["metric"]
    of = pairs(block, name, other)
    return {seed: 100 * (_test(ours)[metric] - _test(theirs)[metric]) for seed, (ours, theirs) in of.items()}


def loss_shares(block: Block, name: str, other: str) -> dict[int, float]:
    """How far one entry's test loss is above another's, in percent, by seed."""
    of = pairs(block, name, other)
    return {seed: 100 * (_test(ours)["loss"] / _test(theirs)["loss"] - 1) for seed, (ours, theirs) in of.items()}


def time_shares(block: Block, name: str, other: str) -> dict[int, float]:
    """One entry's seconds as a share of another's, by seed, where neither ran beside other work."""
    of = pairs(block, name, other)
    return {
        seed: ours["seconds"] / theirs["seconds"]
        for seed, (ours, theirs) in of.items()
        if len(quiet((ours, theirs))) == 2
    }


def _test(cell: Cell) -> Mapping[str, float]:
    return cell["metrics"]["test"]


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


def over(of: Mapping[str, Block], name: str, other: str, what: What = differences) -> Over:
    """One entry beside another, of blocks by task: by seed the mean over the tasks that both have.

    Seeds are draws, tasks are not: the interval is over seeds, each the mean over the same tasks.
    """
    tasks = [task for task, block in of.items() if all(worked(by_entry(block).get(n, ())) for n in (name, other))]
    if not tasks or name == other:
        return Over([], None, None)
    by_task = [what(of[task], name, other) for task in tasks]
    seeds = set.intersection(*(set(by_seed) for by_seed in by_task))
    if not seeds:
        return Over(tasks, None, None)
    found = [[by_seed[seed] for by_seed in by_task] for seed in sorted(seeds)]
    return Over(tasks, interval([float(np.mean(of_seed)) for of_seed in found]), min(map(min, found)))


def of_kind(found: Sequence[Block], kind: tuple[Any, ...]) -> dict[str, Block]:
    """The kind's blocks by task."""
    return {block["block"]["task"]: block for block in found if kind_of(block) == kind}
