"""The plots of docs/results.md."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from results_shown import (
    Block,
    Cell,
    blocks,
    by_entry,
    commit_of,
    differences,
    pairs,
    passes,
    rank_of,
    time_shares,
    trainable,
)

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
COLOURS = ("#000000", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#999933")
"""Told apart by the colour-blind too (Okabe and Ito)."""

REFERENCE = "lora+all"


def _by_cell(cost: Callable[[Cell], float]) -> Callable[[Block, str], Mapping[int, float]]:
    return lambda block, entry: {seed: cost(ours) for seed, (ours, _) in pairs(block, entry, REFERENCE).items()}


def _samples(cell: Cell) -> int:
    return sum(cell["cost"][phase]["backward"] for phase in ("warm-up", "training") if phase in cell["cost"])


COSTS: dict[str, tuple[str, Callable[[Block, str], Mapping[int, float]]]] = {
    "parameters": ("trainable parameters", _by_cell(trainable)),
    "passes": ("passes", _by_cell(passes)),
    "seconds": (f"seconds, as a share of {REFERENCE}'s", lambda block, entry: time_shares(block, entry, REFERENCE)),
    "samples": ("rows trained on, repeats counted", _by_cell(_samples)),
}
"""By the name of a plot's file: its x-axis, and what an entry's cells of a block cost by seed."""


class Dot(NamedTuple):
    """An entry in a block: the means over the seeds that it and the reference have."""

    entry: str
    wrong: float
    cost: float
    difference: float
    seeds: set[int]
    commits: set[str]


def dots_of(plot: str) -> list[Dot]:
    """Of blocks at equal steps; of seconds, the seeds alone that ran beside nothing else.  The reference lies at 0."""
    cost_of, found = COSTS[plot][1], list[Dot]()
    for block in blocks():
        for entry in by_entry(block) if block["block"]["equal"] == "steps" else ():
            cost, gained = cost_of(block, entry), differences(block, entry, REFERENCE)
            if cost:
                both = [cell for seed, of in pairs(block, entry, REFERENCE).items() if seed in cost for cell in of]
                means = (float(np.mean([by_seed[seed] for seed in sorted(cost)])) for by_seed in (cost, gained))
                found.append(Dot(entry, block["block"]["wrong"], *means, {*cost}, {*map(commit_of, both)}))
    return sorted(found, key=lambda dot: (rank_of(dot.entry), dot[1:4]))


def plot() -> None:
    """Points against LoRA on all rows, a dot a block and entry; below each plot its seeds and commits."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "tsqlora", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    PLOTS.mkdir(exist_ok=True)
    for name, (label, _) in COSTS.items():
        dots = dots_of(name)
        figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
        for entry in dict.fromkeys(dot.entry for dot in dots):
            colour = COLOURS[rank_of(entry)[0] % len(COLOURS)]
            for wrong, marker in ((False, "o"), (True, "^")):
                of = [(dot.cost, dot.difference) for dot in dots if dot.entry == entry and bool(dot.wrong) == wrong]
                if of:
                    what = f"{entry}, {'20 % wrong' if wrong else 'clean'}"
                    axes.scatter(*zip(*of, strict=True), color=colour, marker=marker, label=what, alpha=0.8)
        axes.axhline(0, color="#777777", linewidth=1)
        axes.set(xlabel=label, ylabel=f"points against {REFERENCE}")
        if axes.collections:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel(_origin(dots), fontsize=7)
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _origin(dots: list[Dot]) -> str:
    if not dots:
        return f"no cells yet that can be compared with {REFERENCE}"
    seeds = sorted(set[int]().union(*(dot.seeds for dot in dots)))
    commits = sorted(set[str]().union(*(dot.commits for dot in dots)))
    return f"seeds {', '.join(map(str, seeds))}; code {', '.join(commits)}"
