"""A comparison -> plotly's figures: differences, seeds side by side, cost against quality."""

from collections.abc import Callable, Mapping
from enum import Enum
from itertools import cycle
from typing import Any

from tsqlora.report.comparison import Comparison, Method
from tsqlora.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Figure, framed, number, plain
from tsqlora.report.metrics import as_points, words

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down")
_ROW = 46
"""Pixels of a method."""
_AXIS, _LEGEND = 70, 30


def unit(metric: str) -> str:
    """What an axis of the metric is called.

    >>> unit("accuracy"), unit("macro_f1")
    ('accuracy, %', 'macro f1')
    """
    return f"{words(metric)}{', %' if as_points(metric) else ''}"


def difference_plot(known: Comparison) -> Figure:
    """Each method's difference from the reference: its mean with the interval, and every seed as a small ring."""
    scale = 100 if as_points(known.metric) else 1
    reference = by_seed(known, known.reference)
    methods = [method for method in known.worked if method.name != known.reference]
    rings: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    for method in methods:
        for seed, value in by_seed(known, method.name).items():
            if seed in reference:
                rings["x"].append(number(scale * (value - reference[seed])))
                rings["y"].append(_label(method))
                rings["text"].append(f"seed {seed}")
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "one seed",
            "marker": {"color": GREY, "size": 9, "symbol": "circle-open", "line": {"width": 1.5}},
            "hovertemplate": "%{text}: %{x:+.3~f}<extra></extra>",
            **rings,
        }
    ]
    for kind, (colour, symbol) in _MARKS.items():
        of = [m for m in methods if m.difference is not None and verdict_of(m) is kind]
        if of:
            traces.append(_intervals(kind.value, of, colour, symbol, scale))
    what = "points" if as_points(known.metric) else words(known.metric)
    figure = framed(
        traces,
        height=_AXIS + _LEGEND + _ROW * len(methods),
        x={"title": {"text": plain(f"{what}, minus {known.reference}")}},
        y=_rows(methods),
    )
    zero = {"type": "line", "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "layer": "below"}
    figure["layout"]["shapes"] = [{**zero, "line": {"color": INK, "width": 1.5}}]
    return figure


class Verdict(Enum):
    """What the comparison says of a method, as legends have it."""

    BETTER = "better"
    NOISE = "within noise"
    WORSE = "worse"
    UNKNOWN = "too few seeds"


_MARKS = {
    Verdict.BETTER: (BLUE, "triangle-right"),
    Verdict.NOISE: (INK, "circle"),
    Verdict.WORSE: (ORANGE, "triangle-left"),
    Verdict.UNKNOWN: (GREY, "x"),
}


def verdict_of(method: Method) -> Verdict:
    """The kind of a method's verdict, which begins with it."""
    known = [kind for kind in Verdict if method.verdict.startswith(kind.value)]
    return known[0] if known else Verdict.UNKNOWN


def _intervals(name: str, methods: list[Method], colour: str, symbol: str, scale: float) -> dict[str, Any]:
    differences = [method.difference for method in methods if method.difference is not None]
    halves = [scale * (d.half or 0.0) for d in differences]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [number(scale * d.mean) for d in differences],
        "y": [_label(method) for method in methods],
        "error_x": {"type": "data", "array": halves, "color": colour, "thickness": 2.5, "width": 6},
        "marker": {"color": colour, "size": 13, "symbol": symbol},
        "text": [
            f"{scale * d.mean:+.3g}{f' ± {half:.2g}' if d.half is not None else ''} over {d.n} seeds"
            for d, half in zip(differences, halves, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }


def seed_plot(known: Comparison) -> Figure:
    """A line for each seed through what every method made of it: lines that are alike are differences that last."""
    scale = 100 if as_points(known.metric) else 1
    styles = zip(cycle(_COLOURS), cycle(_SYMBOLS), strict=False)
    traces = []
    for seed, (colour, symbol) in zip(known.seeds, styles, strict=False):
        of = [(m, by_seed(known, m.name)[seed]) for m in known.worked if seed in by_seed(known, m.name)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"seed {seed}",
                "x": [number(scale * value) for _, value in of],
                "y": [_label(method) for method, _ in of],
                "line": {"color": colour, "width": 1.5},
                "marker": {"color": colour, "size": 10, "symbol": symbol},
                "hovertemplate": f"seed {seed}: %{{x:.4~f}}<extra></extra>",
            }
        )
    return framed(
        traces,
        height=_AXIS + _LEGEND + _ROW * len(known.worked),
        x={"title": {"text": plain(f"{known.split} {unit(known.metric)}")}},
        y=_rows(known.worked),
    )


def quality_by_cost(known: Comparison, title: str, cost: Callable[[Method], float]) -> Figure:
    """What a method reached over what it took: the nearer to the upper left (of a loss the lower) the better."""
    scale = 100 if as_points(known.metric) else 1
    styles = zip(cycle(_COLOURS), cycle(_SYMBOLS), strict=False)
    traces = []
    for method, (colour, symbol) in zip(known.worked, styles, strict=False):
        found = method.metrics[known.metric]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(method.name),
                "x": [number(cost(method))],
                "y": [number(scale * found.mean)],
                "error_y": {"type": "data", "array": [scale * (found.half or 0.0)], "color": colour, "width": 5},
                "marker": {"color": colour, "size": 13, "symbol": symbol},
                "hovertemplate": f"{plain(method.name)}<br>%{{x:,.4~s}}, %{{y:.4~f}}<extra></extra>",
            }
        )
    figure = framed(
        traces,
        height=320 + 22 * len(traces),
        x={"title": {"text": title}, "rangemode": "tozero", "nticks": 6},
        y={"title": {"text": plain(f"{known.split} {unit(known.metric)}")}},
    )
    figure["layout"]["legend"] |= {"orientation": "v"}
    return figure


def phase_bars(known: Comparison) -> Figure:
    """Mean seconds by phase, one upon the other."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": plain(phase),
            "y": [_label(method) for method in known.worked],
            "x": [seconds_of(method).get(phase, 0.0) for method in known.worked],
            "marker": {"color": colour},
            "hovertemplate": f"{plain(phase)}: %{{x:,.1f}} s<extra></extra>",
        }
        for phase, colour in zip(phases_of(known), cycle(_COLOURS), strict=False)
    ]
    figure = framed(
        traces,
        height=_AXIS + _LEGEND + _ROW * len(known.worked),
        x={"title": {"text": "seconds"}, "rangemode": "tozero", "nticks": 6},
        y=_rows(known.worked),
    )
    figure["layout"] |= {"barmode": "stack", "bargap": 0.35}
    figure["layout"]["legend"] |= {"traceorder": "normal"}
    return figure


_PHASES = ("building", "warm-up", "scoring", "ranks", "training")


def phases_of(known: Comparison) -> list[str]:
    """Phases that any training had, in the order in which they begin."""
    found = dict.fromkeys(phase for method in known.worked for trained in method.trained for phase in trained.phases)
    return [phase for phase in _PHASES if phase in found] + [phase for phase in found if phase not in _PHASES]


def seconds_of(method: Method) -> dict[str, float]:
    """Mean seconds of each phase over a method's seeds."""
    phases = dict.fromkeys(phase for trained in method.trained for phase in trained.phases)
    return {phase: sum(t.phases.get(phase, 0.0) for t in method.trained) / len(method.trained) for phase in phases}


def passes_of(method: Method) -> float:
    """Rows forward, and rows backward twice, in the mean over a method's seeds."""
    return sum(trained.passes for trained in method.trained) / len(method.trained)


def by_seed(known: Comparison, name: str) -> dict[int, float]:
    """The metric of a method by seed."""
    method = next(method for method in known.methods if method.name == name)
    return {trained.seed: trained.metrics[known.metric] for trained in method.trained}


def _label(method: Method) -> str:
    """A name in two lines, for phones."""
    return plain(method.name).replace("+", "<br>+")


def _rows(methods: list[Method]) -> Mapping[str, Any]:
    order = [_label(method) for method in methods]
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": order,
        "range": [len(order) - 0.5, -0.5],
        "showgrid": True,
        "fixedrange": True,
    }
