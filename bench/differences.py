"""What each way to train gains over even draws in the worlds of bench/worlds.py, as a table and as a forest plot.

Differences are in points of accuracy, by seed and test row: both ways were trained on the same pool, and predicted the
same rows. Their 95 % intervals come from a bootstrap that draws seeds and, within each, test rows.
"""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "worlds"
DRAWS, PERCENTILES = 2000, (2.5, 97.5)
WORLDS = {
    "shortcut": "a shortcut",
    "shortcut-mpnet": "a shortcut (MPNet)",
    "overlap": "a shortcut (MRPC)",
    "both": "a shortcut and 20 % wrong labels",
    "weak": "weak labels",
    "shortcut-careless": "a shortcut, careless trusted rows",
    "weak-careless": "weak labels, careless trusted rows",
    "wrong20": "20 % wrong labels (SST-2)",
    "intents-wrong40": "40 % wrong labels (CLINC150)",
    "intents": "150 classes, clean",
    "clean": "nothing to win (SST-2)",
    "clean-mrpc": "nothing to win (MRPC)",
}
"""What the worlds are called, in the order of plot and table."""
WAYS = {
    "default": ("tsqlora with trusted rows", "#0072b2", "o"),
    "last": ("trusted rows always last", "#0072b2", "s"),
    "trusted": ("trusted rows alone", "#e69f00", "s"),
    "cleanlab-then-trusted": ("cleanlab, then trusted rows", "#009e73", "^"),
    "default-untrusted": ("tsqlora without trusted rows", "#56b4e9", "o"),
    "cleanlab": ("cleanlab", "#009e73", "v"),
    "dfr": ("even draws, the head refitted on trusted rows (DFR)", "#d55e00", "P"),
    "knn": ("neighbours' vote (SimiFeat)", "#999999", "v"),
    "jtt": ("JTT", "#cc79a7", "D"),
    "lora": ("plain LoRA, all rows", "#000000", "x"),
}
WITHOUT_TRUSTED = ("default-untrusted", "even-untrusted", "cleanlab", "knn", "jtt", "lora")
"""Ways that have no trusted rows; they are compared with even draws that have none."""


FRESH = 3
"""Seeds below are the screen, on which the default was chosen; where a world has later ones, those are its results."""


def cells() -> pd.DataFrame:
    """A row for each cell of the fresh seeds; of the screen, for worlds and trusted rows that have no fresh seeds."""
    stored = all_cells()
    fresh = stored.assign(fresh=stored.seed >= FRESH, without=stored.method.isin(WITHOUT_TRUSTED))
    return fresh[fresh.fresh == fresh.groupby(["world", "trusted", "without"]).fresh.transform("any")]


def all_cells() -> pd.DataFrame:
    stored = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return pd.DataFrame([{**cell, **cell["settings"]} for cell in stored])


def screen() -> pd.DataFrame:
    """A row for each cell of the screen."""
    stored = all_cells()
    return stored[stored.seed < FRESH]


def right(cell: pd.Series) -> np.ndarray:
    """Which test rows were predicted right, as 0 and 1."""
    return np.unpackbits(np.array(cell["right"], dtype=np.uint8))[: cell["test_rows"]].astype(float)


def against_even(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each world, number of trusted rows and way: the mean difference to even draws, and its interval."""
    rows = []
    keys = ["world", "trusted", "method"]
    for world, trusted, method in cells[keys].drop_duplicates().itertuples(index=False):
        of = cells[(cells.world == world) & (cells.trusted == trusted) & (cells.method == method)]
        even = cells[
            (cells.world == world) & (cells.method == ("even-untrusted" if method in WITHOUT_TRUSTED else "even"))
        ]
        if method not in WITHOUT_TRUSTED:
            even = even[even.trusted == trusted]
        twins = even.set_index("seed")
        gains = [
            100 * (right(cell) - right(twins.loc[cell.seed])) for _, cell in of.iterrows() if cell.seed in twins.index
        ]
        if str(method).startswith("even") or not gains:
            continue
        rng = np.random.default_rng(0)  # the same seed for each row, so that no row depends on the others
        draws = [_resampled(gains, rng) for _ in range(DRAWS)]
        low, high = np.percentile(draws, PERCENTILES)
        row = {"world": world, "trusted": trusted, "method": method, "seeds": len(gains)}
        rows.append({**row, "gain": float(np.mean(gains)), "low": low, "high": high})
    return pd.DataFrame(rows)


def _resampled(gains: list[np.ndarray], rng: np.random.Generator) -> float:
    """The mean over seeds drawn with replacement, and in each over test rows drawn with replacement."""
    drawn = rng.integers(len(gains), size=len(gains))
    return float(np.mean([gains[j][rng.integers(len(gains[j]), size=len(gains[j]))].mean() for j in drawn]))


LEAST = -30
"""Where the plot ends: a way that loses more stands there with its number."""


def plot() -> bytes:
    """An SVG picture: worlds down, the difference to even draws across, a mark for each way to train."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "tsqlora", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    table = against_even(cells())
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
            if cell.gain < LEAST:
                axes.text(LEAST, place + offset, f"← {cell.gain:.0f}", color=colour, fontsize=8, va="center")
                continue
            error = [[cell.gain - cell.low], [cell.high - cell.gain]]
            axes.errorbar(cell.gain, place + offset, xerr=error, color=colour, marker=marker, markersize=5, label=name)
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(lines)), [f"{WORLDS[world]}\n{_rows(table, world, trusted)}" for world, trusted in lines])
    axes.invert_yaxis()
    axes.set_xlabel("points of accuracy against even draws, trusted rows mixed in")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)
    return buffer.getvalue()


def _rows(table: pd.DataFrame, world: str, trusted: int) -> str:
    here = table[(table.world == world) & (table.trusted == trusted)]
    return "no trusted rows" if here.method.isin(WITHOUT_TRUSTED).all() else f"{trusted} trusted rows"
