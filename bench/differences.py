"""What each way to train gains over even draws in the worlds of bench/worlds.py, for tables and a forest plot.

Differences are in points and by seed: both ways were trained on the same pool, and predicted the same rows. Their 95 %
intervals are t intervals over seeds. A seed has its own pool, trusted rows and training, of one data set: the
intervals do not hold for other data.
"""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).parents[1]
WORLDS = {
    "shortcut": "shortcut",
    "both": "shortcut, 20 % wrong",
    "weak": "weak labels",
    "overlap": "word overlap (MRPC)",
    "clean": "clean",
    "intents-wrong40": "150 classes, 40 % wrong",
    "intents-one10": "150 classes, 10 % moved to one",
}
"""What the worlds are called, in the order of plot and tables."""
WAYS = {
    "default": ("tsqlora", "#0072b2", "o"),
    "always": ("trusted rows last, whatever the pool answers", "#cc79a7", "v"),
    "alone": ("the trusted rows alone, stopped early", "#e69f00", "s"),
    "lora": ("plain LoRA", "#000000", "x"),
}
"""What the ways to train are called, their colour and mark, in the order of the tables; all but plain LoRA and the
trusted rows alone start from the fitted head."""
LAST = "worlds-last"
"""Cells of the rule before, by which trusted rows always came last."""
ASKS = "worlds"
"""Cells of today's rule, that of bench/worlds.py: the run asks the pool."""
RATE, RATES_SEED = 5e-4, 19
"""The rate of a way without a choice, and the seed whose cells choose; see bench/worlds.py."""


def stored(rule: str) -> pd.DataFrame:
    """A row for each cell of the rule, at any rate."""
    cells = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results" / rule).glob("*.json"))]
    return pd.DataFrame(
        [{**cell, **cell["settings"], "rate": cell["settings"]["training"]["learning_rate"]} for cell in cells]
    )


def rates() -> pd.DataFrame:
    """Accuracy on held-out training rows by world and way, a column a rate."""
    cells = stored(LAST)
    return cells[cells.seed == RATES_SEED].pivot_table(index=["world", "method"], columns="rate", values="accuracy")


def cells(rule: str = ASKS) -> pd.DataFrame:
    """A row for each cell at the rate that was chosen for its way and world; of today's rule all have one rate."""
    chosen = {str(key): rate for key, rate in rates().idxmax(axis=1).items()} if rule == LAST else {}
    cells = stored(rule)
    rate = [chosen.get(str(key), RATE) for key in zip(cells.world, cells.method, strict=True)]
    return cells[(cells.seed != RATES_SEED) & (cells.rate == rate)]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean's 95 % t interval; nan for one value."""
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def against_even(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each world, number of trusted rows and way: accuracy and worst group less those of even draws."""
    rows = []
    for (world, trusted), here in cells.groupby(["world", "trusted"], sort=False):
        even = here[here.method == "even"].set_index("seed")
        for method, of in here[here.method != "even"].groupby("method", sort=False):
            pairs = of.set_index("seed").join(even, rsuffix="_even", how="inner")
            row = {"world": world, "trusted": trusted, "method": method, "seeds": len(pairs)}
            for name in ("accuracy", "worst"):
                values = 100 * (pairs[name] - pairs[f"{name}_even"]).to_numpy(float)
                low, high = interval(values)
                row |= {name: values.mean() if len(values) else np.nan, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


LEAST = -20
"""Where the plot ends: a way that loses more stands there with its number."""


def plot() -> bytes:
    """An SVG picture: worlds down, the difference to even draws across, a mark for each way to train."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "tsqlora", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    table = against_even(cells())
    table = table[(table.seeds > 1) & table.method.isin(WAYS)]
    lines = [
        (world, trusted)
        for world in WORLDS
        for trusted in sorted(table[table.world == world].trusted.unique(), reverse=True)
    ]
    figure, axes = pyplot.subplots(figsize=(8.0, 0.62 * len(lines) + 1.8), layout="constrained")
    for place, (world, trusted) in enumerate(lines):
        here = table[(table.world == world) & (table.trusted == trusted)].set_index("method")
        ways = [way for way in WAYS if way in here.index]
        for offset, way in zip(np.linspace(-0.3, 0.3, len(ways)), ways, strict=True):
            (name, colour, marker), cell = WAYS[way], here.loc[way]
            if cell.accuracy < LEAST:
                text = f"← {cell.accuracy:.0f}"
                axes.text(LEAST, place + offset, text, color=colour, fontsize=8, va="center")
                continue
            error = [[cell.accuracy - cell.accuracy_low], [cell.accuracy_high - cell.accuracy]]
            axes.errorbar(
                cell.accuracy, place + offset, xerr=error, color=colour, marker=marker, markersize=5, label=name
            )
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(lines)), [f"{WORLDS[world]}\n{trusted} trusted rows" for world, trusted in lines])
    axes.invert_yaxis()
    axes.set_xlabel("points of accuracy against even draws with the trusted rows mixed in")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)
    return buffer.getvalue()
