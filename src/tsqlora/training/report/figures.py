"""Plotly figures of a run.

Colours are those of the light theme; the page's script replaces them with DARK's. Colour-blind readers can tell them
apart (after Okabe and Ito; maps by lightness), and colour is never the only sign.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tsqlora.auditing.page import layer_places, words
from tsqlora.auditing.scores import Scores
from tsqlora.record import RankEvent

BLUE, ORANGE, GREEN = "#0072b2", "#c44e00", "#007f5f"
GREY = "#5f6b7a"
INK = "#17202d"
SCALE = ("#f6f7e4", "#d3ecc4", "#93d3c2", "#52b2cf")
"""Colours of maps, from 0 up; text in INK is readable on all."""
DARK = {BLUE: "#63b8f0", ORANGE: "#f0a030", GREEN: "#3fc79a"}
DARK |= {GREY: "#a4b0bf", INK: "#ffffff"}
DARK |= dict(zip(SCALE, ("#222e3b", "#24475f", "#286086", "#2d78a8"), strict=True))
_METRICS, _DASHES = (BLUE, ORANGE, GREEN, GREY), ("solid", "dash", "dot", "dashdot", "longdash")
FRAMES = 200
"""States of the rank map on a page; beyond that, evenly spaced ones."""
_POINTS = 2000
"""Points of a curve on a page."""
_FEW = 12
"""Up to this many points a curve has markers: a line of one point is invisible."""
BINS = 40
TAIL = 0.002
"""The share of rows at each end that falls into the outermost bin, at any distance."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure with its id, title, and text for screen readers."""

    id: str
    title: str
    text: str
    figure: go.Figure


def framed(traces: Sequence[Any], *, height: int, **layout: Any) -> go.Figure:
    """Traces in the common layout; the page's script sets fonts and lines by theme."""
    figure = go.Figure(
        list(traces),
        {
            "height": height,
            "template": {},  # plotly's own would be 7 kB in every figure
            "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel_align": "left",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
        },
    )
    axis = {"automargin": True, "zeroline": False}
    return figure.update_layout(xaxis=axis, yaxis=axis).update_layout(layout)


def plain(text: str) -> str:
    """Escape a text, because plotly interprets tags."""
    return escape(text, quote=False)


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` values, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(j * (len(values) - 1) / (most - 1))] for j in range(most)]


# ---------------------------------------------------------------------------------- curves


def curves(history: Sequence[Mapping[str, float]], *, looks: Sequence[int], events: Sequence[RankEvent]) -> list[Drawn]:
    """Losses by step, and logged validation metrics; a line marks each look, a triangle each adjustment of ranks."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    text = f" It went from {losses[0]:.3g} to {losses[-1]:.3g}." if losses else ""
    traces = [_curve(history, "loss", "training loss", BLUE), _curve(history, "eval_loss", "validation loss", ORANGE)]
    loss = framed([trace for trace in traces if trace.x], height=340, yaxis_title="loss")
    drawn = [Drawn("loss", "Loss", f"Training and validation loss by step.{text}", loss)]
    names = dict.fromkeys(n for entry in history for n in entry if n.startswith("eval_") and n != "eval_loss")
    if names:
        styles = zip(names, cycle(_METRICS), cycle(_DASHES), strict=False)
        traces = [_curve(history, n, words(n.removeprefix("eval_")), colour, dash) for n, colour, dash in styles]
        metric = framed(traces, height=300, yaxis_title="validation")
        drawn.append(Drawn("metric", "Metrics of the validation rows", "Validation metrics by step.", metric))
    shown = thinned(events, FRAMES)
    adjusted = go.Scatter(
        mode="markers",
        name="ranks adjusted",
        x=[event.step for event in shown],
        y=[0.03] * len(shown),
        yaxis="y2",
        marker={"color": GREY, "size": 9, "symbol": "triangle-up"},
        text=[f"step {event.step}: {moved(event)}" for event in shown],
        hoverinfo="text",
    )
    for figure in (one.figure for one in drawn):
        figure.update_xaxes(title="step")
        for step in looks:
            figure.add_vline(x=step, line={"color": GREEN, "width": 2, "dash": "dash"}, annotation_text="look")
        if shown:
            figure.add_trace(adjusted)
            figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})
    return drawn


def _curve(history: Sequence[Mapping[str, float]], key: str, name: str, colour: str, dash: str = "solid") -> go.Scatter:
    points = thinned([(int(entry["step"]), entry[key]) for entry in history if key in entry], _POINTS)
    return go.Scatter(
        mode="lines" if len(points) > _FEW else "lines+markers",
        name=plain(name),
        x=[step for step, _ in points],
        y=[value if math.isfinite(value) else None for _, value in points],
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "size": 7},
    )


# ----------------------------------------------------------------------------------- ranks


class Grid:
    """Layers in a grid of module kinds × blocks; layers outside the blocks share a last column."""

    OUTSIDE = "other"

    def __init__(self, layers: Sequence[str]) -> None:
        places = layer_places(layers)
        self.blocks = list(dict.fromkeys(block or self.OUTSIDE for block, _ in places.values()))
        self.kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        self.blocks.sort(key=lambda block: block == self.OUTSIDE)
        self._layers = {(kind, block or self.OUTSIDE): layer for layer, (block, kind) in places.items()}

    def rows(self, values: Mapping[str, Any]) -> list[list[Any]]:
        """A list per kind with a value per block; None for a missing layer."""
        return [[values.get(self._layers.get((kind, block), "")) for block in self.blocks] for kind in self.kinds]


def moved(event: RankEvent) -> str:
    """The number of moved slots, in words."""
    return f"{event.moved:,} slot{'' if event.moved == 1 else 's'} moved"


def rank_frames(first: Mapping[str, int], events: Sequence[RankEvent]) -> list[dict[str, Any]]:
    """States of the rank map in order: step, text, and ranks by kind × block."""
    grid = Grid(list(first))
    states = [(0, "the start", first), *((e.step, moved(e), e.ranks) for e in events)]
    return [{"step": step, "what": what, "z": grid.rows(ranks)} for step, what, ranks in thinned(states, FRAMES)]


def rank_map(first: Mapping[str, int], events: Sequence[RankEvent]) -> Drawn:
    """A map of the last ranks, on a scale that fits every state."""
    most = max(rank for ranks in (first, *(event.ranks for event in events)) for rank in ranks.values())
    last = events[-1].ranks if events else first
    figure = _layer_map(Grid(list(first)), last, most=most, title="rank", text="%{z}", hover="rank %{z}")
    text = f"Ranks of {len(last)} layers by block and kind of module; see the table below."
    return Drawn("ranks-map", "Rank map", text, figure)


def confusion_map(classes: Sequence[Any], confusions: Iterable[Sequence[int]]) -> Drawn:
    """The measured rows by class and predicted class."""
    names, counts = [plain(str(name)) for name in classes], {(a, b): n for a, b, n in confusions}
    places = range(len(names))
    figure = _heatmap(
        [[counts.get((a, b), 0) for b in places] for a in places],
        (names, names),
        most=max(counts.values()),
        titles=("predicted", "rows"),
        text="%{z}",
        hover="%{z} rows of %{y}, predicted as %{x}<extra></extra>",
    )
    text = "Measured rows by class and predicted class; see the table below."
    return Drawn("confusion-map", "Rows by class (down) and predicted class (across)", text, figure)


def sensitivity_maps(events: Sequence[RankEvent]) -> list[Drawn]:
    """Each layer's share of the total sensitivity, in percent, at the first and last adjustment."""
    first, last = shares(events[0]), shares(events[-1])
    most, top = max([*first.values(), *last.values()]), max(last, key=lambda layer: last[layer])
    largest = f" {top} has the largest share, {last[top]:.1f} %."
    drawn = []
    for when, event, values, more in (("first", events[0], first, ""), ("last", events[-1], last, largest)):
        grid = Grid(list(values))
        figure = _layer_map(grid, values, most=most, title="%", text="%{z:.1f}", hover="%{z:.2f} % of the sum")
        title, text = f"{when}, at step {event.step:,}".capitalize(), f"Sensitivity by layer at {when}.{more}"
        drawn.append(Drawn(f"sensitivity-{when}", title, text, figure))
    return drawn


def shares(event: RankEvent) -> dict[str, float]:
    """Sensitivities in percent of their sum; all 0 if the sum is 0."""
    total = sum(event.sensitivity.values())
    return {layer: 100 * value / total if total else 0.0 for layer, value in event.sensitivity.items()}


def _layer_map(grid: Grid, values: Mapping[str, Any], *, most: float, title: str, text: str, hover: str) -> go.Figure:
    kinds, hover = [plain(kind) for kind in grid.kinds], f"block %{{x}}, %{{y}}<br>{hover}<extra></extra>"
    how = {"most": most, "titles": ("block", title), "text": text, "hover": hover}
    return _heatmap(grid.rows(values), (grid.blocks, kinds), **how)


def _heatmap(
    z: list[list[Any]],
    names: tuple[Sequence[str], Sequence[str]],
    *,
    most: float,
    titles: tuple[str, str],
    text: str,
    hover: str,
) -> go.Figure:
    """Cells with their numbers; `names` are those of the columns and rows, `titles` of the columns and the scale."""
    (columns, rows), (across, scale) = names, titles
    trace = go.Heatmap(
        z=z,
        x=columns,
        y=rows,
        zmin=0,
        zmax=most or 1,
        colorscale=[[j / (len(SCALE) - 1), colour] for j, colour in enumerate(SCALE)],
        textfont={"color": INK, "size": 13},
        texttemplate=text,
        hovertemplate=hover,
        hoverongaps=False,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": scale}, "thickness": 10, "len": 1},
    )
    cells = {"type": "category", "showgrid": False, "fixedrange": True}
    return framed(
        [trace],
        height=90 + 34 * len(rows),
        # The smallest width in which numbers and names are readable.
        width=34 * len(columns) + 7 * max(map(len, rows)) + 70,
        xaxis={**cells, "title": {"text": across}},
        yaxis={**cells, "autorange": "reversed"},
    )


# --------------------------------------------------------------------------- distributions


def histograms(scores: Scores) -> list[Drawn]:
    """Histograms of each term, Q and, unless all are equal, p: kept rows as bars, left-out rows as a line."""
    kept, drawn = scores.kept, list[Drawn]()
    named = [(words(name), values, ~kept) for name, values in scores.terms.items()]
    named.append(("Q, the quality", scores.quality, ~kept))
    if not scores.even:  # left-out rows have none
        named.append(("p, the probability of a draw", scores.probability, np.zeros_like(kept)))
    line = {"color": ORANGE, "width": 2.5, "shape": "hvh"}
    axes: dict[str, Any] = {"xaxis": {"nticks": 6}, "yaxis": {"tickformat": ".0%", "rangemode": "tozero", "nticks": 5}}
    for j, (name, values, left_out) in enumerate(named):
        values = np.asarray(values, dtype=np.float64)
        shown = values[kept | left_out]
        edges = bins(shown)
        least, most = f"{shown.min() + 0.0:.4g}", f"{shown.max() + 0.0:.4g}"  # no -0
        span = f"each {least}" if least == most else f"from {least} to {most}"
        traces = [
            kind(**_counted(values[rows], edges, label), **style)
            for label, rows, kind, style in (
                ("kept", kept, go.Bar, {"marker": {"color": BLUE, "line": {"width": 0}}}),
                ("left out", left_out, go.Scatter, {"mode": "lines", "line": line}),
            )
            if rows.any()
        ]
        figure = framed(traces, height=240, bargap=0, showlegend=True, **axes)
        text = f"{name} of {kept.sum():,} kept and {left_out.sum():,} left-out rows, {span}."
        drawn.append(Drawn(f"histogram-{j}", f"{name} ({span})", text, figure))
    return drawn


def bins(values: np.ndarray) -> np.ndarray:
    """Edges of BINS bins between the tails, or around a single value."""
    for low, high in (np.quantile(values, [TAIL, 1 - TAIL]), (values.min(), values.max())):
        if high - low > 1e-12 * max(abs(low), abs(high)):
            return np.linspace(low, high, BINS + 1)
    spread = abs(values[0]) / 2 or 0.5
    return np.linspace(values[0] - spread, values[0] + spread, BINS + 1)


def _counted(values: np.ndarray, edges: np.ndarray, name: str) -> dict[str, Any]:
    """Share of values per bin; the outermost bins include the tails."""
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
    return {
        "name": f"{name}: {len(values):,}",
        "x": [(low + high) / 2 for low, high in pairwise(edges.tolist())],
        "y": [count / len(values) for count in counts],
        "hovertext": [
            f"{name}: {count:,} rows of {low:.4g} to {high:.4g}"
            for count, (low, high) in zip(counts, pairwise(edges), strict=True)
        ],
        "hoverinfo": "text",
    }
