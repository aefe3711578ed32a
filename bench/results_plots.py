"""The plots of docs/research/glue.md."""

from pathlib import Path

import pandas as pd
from glue_cells import BLOCK, REFERENCES, beside, entries_of, rank_of, shown, stored

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
COLOURS = ("#000000", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#999933")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
REFERENCE = REFERENCES[0]
COSTS = {
    "parameters": ("trainable parameters", "trainable"),
    "passes": ("passes", "passes"),
    "seconds": (f"seconds, as a share of {REFERENCE}'s", "time_share"),
    "samples": ("rows trained on, repeats counted", "samples"),
}
"""By the name of a plot's file: the x-axis, and the column of `beside`."""


def dots_of(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean cost and gain of each entry and block at equal steps; of seconds, over seeds that ran alone."""
    pairs = beside(cells[cells["equal"] == "steps"], REFERENCE).dropna(subset=column)
    return pairs.groupby([*BLOCK, "entry"], sort=False)[[column, "gain"]].mean().reset_index()


def plot() -> None:
    """Points against LoRA on all rows, a dot a block and entry; below each plot its seeds and commits."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "tsqlora", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    PLOTS.mkdir(exist_ok=True)
    cells = shown(stored())
    for name, (label, column) in COSTS.items():
        dots = dots_of(cells, column)
        figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
        for entry in entries_of(dots):
            colour = COLOURS[rank_of(entry)[0] % len(COLOURS)]
            for wrong, marker in ((False, "o"), (True, "^")):
                of = dots[(dots["entry"] == entry) & (dots["wrong"].astype(bool) == wrong)]
                if len(of):
                    what = f"{entry}, {'20 % wrong' if wrong else 'clean'}"
                    axes.scatter(of[column], of["gain"], color=colour, marker=marker, label=what, alpha=0.8)
        axes.axhline(0, color="#777777", linewidth=1)
        axes.set(xlabel=label, ylabel=f"points against {REFERENCE}")
        if axes.collections:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel(_origin(cells, column), fontsize=7)
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _origin(cells: pd.DataFrame, column: str) -> str:
    pairs = beside(cells[cells["equal"] == "steps"], REFERENCE).dropna(subset=column)
    if pairs.empty:
        return f"no cells yet that can be compared with {REFERENCE}"
    commits = sorted({*pairs["commit"], *pairs["commit_theirs"]})
    return f"seeds {', '.join(map(str, sorted(pairs['seed'].unique())))}; code {', '.join(commits)}"
