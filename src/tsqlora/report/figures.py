"""Plain values -> plotly's figures, as the dicts that plotly.js takes.

Colours are those of the light theme; the page puts DARK's in their place. They are told apart by
the colour-blind too (after Okabe and Ito; maps of numbers by lightness), and never say anything alone.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle, pairwise
from typing import Any

from tsqlora.ranks.events import RankEvent
from tsqlora.ranks.places import layer_places
from tsqlora.report.distributions import Distribution
from tsqlora.training.record import PhaseCost

Figure = dict[str, Any]

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#c44e00", "#007f5f", "#8a4a9e"
GREY, PALE = "#5f6b7a", "#e3e8ef"
INK = "#17202d"
SCALE = ("#f6f7e4", "#d3ecc4", "#93d3c2", "#52b2cf")
"""Of maps, from 0 up: numbers in INK can be read on each."""
DARK = {BLUE: "#63b8f0", ORANGE: "#f0a030", GREEN: "#3fc79a", PURPLE: "#d7a0ea"}
DARK |= {GREY: "#a4b0bf", PALE: "#2b3441", INK: "#ffffff"}
DARK |= dict(zip(SCALE, ("#222e3b", "#24475f", "#286086", "#2d78a8"), strict=True))
_METRICS, _DASHES = (BLUE, ORANGE, GREEN, GREY), ("solid", "dash", "dot", "dashdot", "longdash")
FRAMES = 200
"""States of the rank map that a page holds; of more adjustments, evenly spaced ones are shown."""
_POINTS = 2000
"""Points of a curve that a page holds."""
_FEW = 12
"""Points of a curve up to which each is marked: a line of one is not seen."""


def framed(traces: list[dict[str, Any]], *, height: int, x: Mapping[str, Any], y: Mapping[str, Any]) -> Figure:
    """Traces with the layout that all figures share; the page sets fonts and lines by its theme."""
    layout = {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
        "xaxis": {"automargin": True, "zeroline": False, **x},
        "yaxis": {"automargin": True, "zeroline": False, **y},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }
    return {"data": traces, "layout": layout}


def plain(text: str) -> str:
    """Text that plotly shows as it stands: it would read tags."""
    return escape(text, quote=False)


def number(value: float) -> float | None:
    """A number as JSON has it: what is not finite is a gap."""
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------------------------- curves


def loss_curve(
    history: Sequence[Mapping[str, float]], *, scored: int | None, warmup: int | None, events: Sequence[RankEvent]
) -> Figure:
    """Training and validation loss by step; warm-up is shaded, scoring a line, each adjustment a triangle."""
    traces = [
        _curve(history, "loss", "training loss", BLUE, "lines"),
        _curve(history, "eval_loss", "validation loss", ORANGE, "lines+markers"),
    ]
    figure = framed(
        [trace for trace in traces if trace["x"]],
        height=340,
        x={"title": {"text": "step"}},
        y={"title": {"text": "loss"}},
    )
    _mark(figure, scored=scored, warmup=warmup, events=events)
    return figure


def metric_curve(
    history: Sequence[Mapping[str, float]], *, scored: int | None, warmup: int | None, events: Sequence[RankEvent]
) -> Figure | None:
    """Metrics of the validation rows by step; None where none was measured while training."""
    names = list(dict.fromkeys(n for entry in history for n in entry if n.startswith("eval_") and n != "eval_loss"))
    if not names:
        return None
    traces = [
        _curve(history, name, plain(name.removeprefix("eval_").replace("_", " ")), colour, "lines+markers")
        for name, colour in zip(names, cycle(_METRICS), strict=False)
    ]
    for trace, dash in zip(traces, cycle(_DASHES), strict=False):
        trace["line"]["dash"] = dash
    figure = framed(traces, height=300, x={"title": {"text": "step"}}, y={"title": {"text": "validation"}})
    _mark(figure, scored=scored, warmup=warmup, events=events)
    return figure


def _curve(history: Sequence[Mapping[str, float]], key: str, name: str, colour: str, mode: str) -> dict[str, Any]:
    points = thinned([(int(entry["step"]), number(entry[key])) for entry in history if key in entry], _POINTS)
    return {
        "type": "scatter",
        "mode": mode if len(points) > _FEW else "lines+markers",
        "name": name,
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 7},
    }


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(j * (len(values) - 1) / (most - 1))] for j in range(most)]


def _mark(figure: Figure, *, scored: int | None, warmup: int | None, events: Sequence[RankEvent]) -> None:
    shapes: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    if warmup:
        band = {"type": "rect", "xref": "x", "yref": "paper", "x0": 0, "x1": warmup, "y0": 0, "y1": 1}
        shapes.append({**band, "fillcolor": PALE, "line": {"width": 0}, "layer": "below"})
        notes.append(_note("warm-up", 0, "left"))
    if scored is not None:
        line = {"type": "line", "xref": "x", "yref": "paper", "x0": scored, "x1": scored, "y0": 0, "y1": 1}
        shapes.append({**line, "line": {"color": GREEN, "width": 2, "dash": "dash"}})
        notes.append(_note("scoring", scored, "left"))
    if shown := thinned(list(events), FRAMES):
        figure["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "ranks adjusted",
                "x": [event.step for event in shown],
                "y": [0.03] * len(shown),
                "yaxis": "y2",
                "marker": {"color": GREY, "size": 9, "symbol": "triangle-up"},
                "text": [f"step {event.step}: {moved(event)}" for event in shown],
                "hoverinfo": "text",
            }
        )
        figure["layout"]["yaxis2"] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    figure["layout"] |= {"shapes": shapes, "annotations": notes}


def _note(text: str, x: float, anchor: str) -> dict[str, Any]:
    place = {"x": x, "xref": "x", "xanchor": anchor, "y": 1, "yref": "paper", "yanchor": "top"}
    return {"text": text, "showarrow": False, "font": {"size": 12}, **place}


# ----------------------------------------------------------------------------------- ranks


class Grid:
    """Layers by their place: kinds of module × blocks; a layer outside the blocks is in a column of its own."""

    OUTSIDE = "other"

    def __init__(self, layers: Sequence[str]) -> None:
        places = layer_places(layers)
        self.blocks = list(dict.fromkeys(block or self.OUTSIDE for block, _ in places.values()))
        self.kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        self.blocks.sort(key=lambda block: block == self.OUTSIDE)
        self._layers = {(kind, block or self.OUTSIDE): layer for layer, (block, kind) in places.items()}

    def rows(self, values: Mapping[str, Any]) -> list[list[Any]]:
        """A list for each kind, with a value for each block; None where there is no such layer."""
        return [[values.get(self._layers.get((kind, block), "")) for block in self.blocks] for kind in self.kinds]

    @property
    def height(self) -> int:
        return 90 + 34 * len(self.kinds)

    @property
    def width(self) -> int:
        """Least pixels in which numbers in cells can be read, names beside them."""
        return 34 * len(self.blocks) + 7 * max(map(len, self.kinds)) + 70


def moved(event: RankEvent) -> str:
    """How many slots went from one layer to another."""
    return f"{event.moved:,} slot{'' if event.moved == 1 else 's'} moved"


def rank_frames(first: Mapping[str, int], events: Sequence[RankEvent]) -> list[dict[str, Any]]:
    """States of the rank map in order: step, what to say of it, and ranks by kind × block."""
    grid = Grid(list(first))
    states = [(0, "the start", first), *((e.step, moved(e), e.ranks) for e in events)]
    return [{"step": step, "what": what, "z": grid.rows(ranks)} for step, what, ranks in thinned(states, FRAMES)]


def rank_map(first: Mapping[str, int], events: Sequence[RankEvent]) -> Figure:
    """The last ranks as coloured cells with their numbers, on a scale that fits every state."""
    grid = Grid(list(first))
    most = max(rank for ranks in (first, *(event.ranks for event in events)) for rank in ranks.values())
    last = events[-1].ranks if events else first
    return _heatmap(grid, grid.rows(last), most=most, title="rank", text="%{z}", hover="rank %{z}")


def sensitivity_map(event: RankEvent, *, most: float) -> Figure:
    """Each layer's share of the sum of all sensitivities, in percent."""
    grid = Grid(list(event.sensitivity))
    return _heatmap(
        grid, grid.rows(shares(event)), most=most, title="%", text="%{z:.1f}", hover="%{z:.2f} % of the sum"
    )


def shares(event: RankEvent) -> dict[str, float]:
    """Sensitivities as percents of their sum; 0 each where the sum is 0."""
    total = sum(event.sensitivity.values())
    return {layer: 100 * value / total if total else 0.0 for layer, value in event.sensitivity.items()}


def _heatmap(grid: Grid, z: list[list[Any]], *, most: float, title: str, text: str, hover: str) -> Figure:
    trace = {
        "type": "heatmap",
        "z": z,
        "x": grid.blocks,
        "y": [plain(kind) for kind in grid.kinds],
        "zmin": 0,
        "zmax": most or 1,
        "colorscale": [[j / (len(SCALE) - 1), colour] for j, colour in enumerate(SCALE)],
        "textfont": {"color": INK, "size": 13},
        "texttemplate": text,
        "hovertemplate": f"block %{{x}}, %{{y}}<br>{hover}<extra></extra>",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"title": {"text": title}, "thickness": 10, "len": 1},
    }
    figure = framed(
        [trace],
        height=grid.height,
        x={"type": "category", "title": {"text": "block"}, "showgrid": False, "fixedrange": True},
        y={"type": "category", "autorange": "reversed", "showgrid": False, "fixedrange": True},
    )
    return figure | {"width": grid.width}


# --------------------------------------------------------------------------- distributions


def histogram(known: Distribution) -> Figure:
    """Bars of the kept rows and a line of the left-out ones, each as a share of its own."""
    middle = [(low + high) / 2 for low, high in pairwise(known.edges)]
    edges = list(pairwise(known.edges))
    traces = []
    for name, counts, colour in (("kept", known.kept, BLUE), ("left out", known.left_out, ORANGE)):
        total = sum(counts)
        if not total:
            continue
        trace = {
            "name": f"{name}: {total:,}",
            "x": middle,
            "y": [count / total for count in counts],
            "hovertext": [
                f"{name}: {count:,} rows of {low:.4g} to {high:.4g}"
                for count, (low, high) in zip(counts, edges, strict=True)
            ],
            "hoverinfo": "text",
        }
        if name == "kept":
            traces.append(trace | {"type": "bar", "marker": {"color": colour, "line": {"width": 0}}})
        else:
            line = {"color": colour, "width": 2.5, "shape": "hvh"}
            traces.append(trace | {"type": "scatter", "mode": "lines", "line": line})
    figure = framed(traces, height=240, x={"nticks": 6}, y={"tickformat": ".0%", "rangemode": "tozero", "nticks": 5})
    figure["layout"] |= {"bargap": 0, "showlegend": True}
    return figure


# ------------------------------------------------------------------------------------ cost


def cost_bars(cost: Mapping[str, PhaseCost]) -> Figure:
    """Seconds by phase."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [plain(name) for name in cost],
        "x": [phase.seconds for phase in cost.values()],
        "text": [f"{phase.seconds:,.1f} s" for phase in cost.values()],
        "textposition": "auto",
        "marker": {"color": BLUE},
        "hoverinfo": "y+text",
    }
    return framed(
        [trace],
        height=70 + 34 * len(cost),
        x={"title": {"text": "seconds"}, "rangemode": "tozero"},
        y={"type": "category", "autorange": "reversed", "showgrid": False},
    )
