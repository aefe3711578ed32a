"""Accuracy against steps and seconds, of bench/headstart.py; run alone, it draws docs/plots/headstart.svg."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "headstart"
PLOT = ROOT / "docs" / "plots" / "headstart.svg"
EPOCHS = 3
"""Of plain LoRA, whose seconds are the measure."""
WAYS = {
    "lora": ("plain LoRA, three epochs", "#000000"),
    "lora+head": ("LoRA from the fitted head", "#e69f00"),
    "tsqlora": ("tsqlora", "#0072b2"),
}
Point = Mapping[str, float]
Curve = Sequence[Point]


def chosen() -> dict[str, dict[str, dict[int, Curve]]]:
    """By table, way to train and seed: the curve at the learning rate that validation rows chose on the first seed."""
    cells = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    runs = pd.DataFrame([{**cell["settings"], "curve": cell["curve"], "headline": cell["headline"]} for cell in cells])
    curves: dict[str, dict[str, dict[int, Curve]]] = {}
    for (table, method), of in runs[~runs.method.str.contains(":")].groupby(["table", "method"]):
        first = of[of.seed == of.seed.min()]
        rate = first.loc[first.headline.idxmax(), "rate"]
        curves.setdefault(str(table), {})[str(method)] = of[of.rate == rate].set_index("seed").curve.to_dict()
    return curves


def reached(curve: Curve, goal: Point) -> tuple[float, float] | None:
    """Shares of another training's steps and seconds until its last accuracy is reached; None if it never is."""
    at = next((point for point in curve if point["accuracy"] >= goal["accuracy"]), None)
    return None if at is None else (at["step"] / goal["step"], at["seconds"] / goal["seconds"])


def area(curve: Curve, *, until: float, before: float) -> float:
    """Mean accuracy over the seconds from 0 to `until`; `before` is that of the model while it is looked at."""
    seconds, accuracy = (np.array([point[name] for point in curve]) for name in ("seconds", "accuracy"))
    at = np.linspace(0, until, 500)
    values = np.interp(at, seconds, accuracy, left=before)
    return float(values.mean())


def plot() -> None:
    """A panel a table: means over seeds of accuracy against the share of plain LoRA's seconds."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "tsqlora", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    tables = chosen()
    rows = -(-len(tables) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(9.0, 2.6 * rows), layout="constrained", squeeze=False)
    for panel, (table, of_table) in zip(axes.flat, tables.items(), strict=False):
        unit = np.mean([curve[-1]["seconds"] for curve in of_table["lora"].values()])
        for method, (name, colour) in WAYS.items():
            if curves := list(of_table.get(method, {}).values()):
                x, y = (
                    np.mean([[p[key] for p in curve] for curve in curves], axis=0) for key in ("seconds", "accuracy")
                )
                panel.plot(x / unit, 100 * y, color=colour, marker=".", markersize=4, linewidth=1.2, label=name)
        panel.set(title=table, xlim=(0, 1.6))
    for panel in list(axes.flat)[len(tables) :]:
        panel.axis("off")
    handles = {
        label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside upper center", ncols=3)
    figure.supxlabel("share of plain LoRA's processor seconds for three epochs; the look included", fontsize=9)
    figure.supylabel("test accuracy, %", fontsize=9)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    plot()
