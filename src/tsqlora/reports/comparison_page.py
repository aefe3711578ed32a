"""The page of a comparison: differences seed by seed, and cost against quality."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from tsqlora.reports.comparison import CHOSEN_ON_SHOWN, Comparison, Method, Tried, counted, made_by, short
from tsqlora.reports.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Drawn, framed, plain
from tsqlora.reports.metrics import as_points, gain_of, lower_is_better, value_of, words
from tsqlora.reports.page import Table, render

VERDICTS = {
    "better": (BLUE, "triangle-right"),
    "within noise": (INK, "circle"),
    "worse": (ORANGE, "triangle-left"),
    "too few seeds": (GREY, "x"),
}
"""Kinds of verdict, as in legends, with their marks."""
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down")
_PHASES = ("building", "look", "ranks", "training")
_ROW, _FRAME = 46, 100
"""Pixels per method, and for axis and legend."""


def comparison_page(comparison: Comparison, script: str) -> str:
    """Render the page; `script` as in `render`."""
    metric, worked = comparison.metric, comparison.worked
    measured = f"{comparison.split} {words(metric)}"
    comparable = bool(comparison.others and comparison.reference.trained)
    drawn = {
        "differences": [difference_plot(comparison)] if comparable else [],
        "costs": [
            quality_by_cost(comparison, "seconds", "seconds", lambda method: method.seconds),
            quality_by_cost(comparison, "passes", "passes of a row", lambda method: method.passes),
        ],
    }
    about, made = comparison.about, made_by(comparison.runs)
    best = (min if lower_is_better(metric) else max)(worked, key=lambda m: m.metrics[metric].mean, default=None)
    return render(
        "comparison.html",
        script=script,
        figures=[figure for part in drawn.values() for figure in part],
        drawn=drawn,
        title=f"{comparison.name}: report of a comparison",
        name=comparison.name,
        about=f"{comparison.runs[0].task} · {len(comparison.methods)} methods at equal {about['equal']} · "
        f"seeds {', '.join(map(str, about['seeds']))}",
        comparison=comparison,
        reference=comparison.reference,
        metric=metric,
        measured=measured.capitalize(),
        lower=lower_is_better(metric),
        best=best,
        quickest=min(worked, key=lambda method: method.seconds, default=None),
        by_verdict={kind: [m for m in comparison.others if verdict_of(m) == kind] for kind in VERDICTS},
        chosen_on_shown=CHOSEN_ON_SHOWN if comparison.chosen_on_shown else None,
        tables=_tables(comparison, measured.capitalize(), made),
        command=_command(comparison),
        seeds=about["seeds"],
        notes=dict.fromkeys(f"{m.name}, seed {t.seed}: {note}" for m in worked for t in m.trained for note in t.notes),
        precisions=made["precision"],
        commits=list(map(short, made["commit"])),
        hashes=sorted({run.data["hash"] for run in comparison.runs}),
    )


def verdict_of(method: Method) -> str:
    """The kind of a method's verdict, which is its first words."""
    return next((kind for kind in VERDICTS if method.verdict.startswith(kind)), "too few seeds")


def _command(comparison: Comparison) -> str:
    """The command that repeats the comparison, quoted for a shell."""
    words = ["tsqlora", "compare", f"{comparison.name}/config.yaml"]
    words += ["--methods", ",".join(method.name for method in comparison.methods)]
    about = comparison.about
    words += ["--seeds", ",".join(map(str, about["seeds"]))]
    words += ["--equal", about["equal"], "--metric", about["metric"]]
    if about["sweep"]:
        words += ["--lr-sweep", ",".join(map(str, about["sweep"]))]
    for name, rate in about["rates"].items():
        words += ["--lr", f"{name}={rate}"]
    return shlex.join([*words, "--out", f"{comparison.name}-again"])


# ----------------------------------------------------------------------------------- tables


def _tables(comparison: Comparison, measured: str, made: Mapping[str, Sequence[str]]) -> dict[str, Table]:
    metric, methods, worked = comparison.metric, comparison.methods, comparison.worked
    seeds = comparison.about["seeds"]
    interval = "mean ± 95 % interval"
    names = list(dict.fromkeys(name for method in worked for name in method.metrics))
    return {
        "summary": Table(
            f"{measured}, {interval}",
            ["method", words(metric), f"minus {comparison.reference.name}", "verdict", "seeds"],
            [_summary(comparison, method) for method in methods],
            texts=[3],
        ),
        "seeds": Table(
            f"{measured} by seed",
            ["method", *(f"seed {seed}" for seed in seeds)],
            [[method.name, *(_seed(method, seed, metric) for seed in seeds)] for method in methods],
        ),
        "costs": _costs(worked),
        "metrics": Table(
            f"{comparison.split} rows, {interval}".capitalize(),
            ["method", *map(words, names)],
            [[m.name, *(value_of(n, *m.metrics[n][:2]) if n in m.metrics else "" for n in names)] for m in worked],
        ),
        "sweep": _sweep(comparison),
        "rates": Table(
            "Learning rate of each method",
            ["method", "rate"],
            [[method.name, ", ".join(f"{rate:g}" for rate in method.learning_rates)] for method in methods],
            texts=[1],
        ),
        "versions": Table(
            "Versions",
            ["library", "version"],
            [[name, ", ".join(values)] for name, values in made.items() if name not in ("commit", "precision")],
            texts=[1],
        ),
    }


def _summary(comparison: Comparison, method: Method) -> list[Any]:
    random, seeds = len(method.at_random), len(method.trained)
    mean, difference = method.metrics.get(comparison.metric), method.difference
    return [
        method.name + (f" ({random} of {seeds} seeds drew at random)" if random else ""),
        value_of(comparison.metric, mean.mean, mean.half) if mean else "–",
        gain_of(comparison.metric, difference.mean, difference.half) if difference else "–",
        method.verdict,
        seeds,
    ]


def _seed(method: Method, seed: int, metric: str) -> str:
    reached = method.by_seed(metric)
    return value_of(metric, reached[seed]) if seed in reached else "failed" if seed in method.failed else "–"


def _costs(methods: Sequence[Method]) -> Table:
    names = dict.fromkeys(phase for method in methods for phase in method.phases)
    phases = [*(phase for phase in _PHASES if phase in names), *(phase for phase in names if phase not in _PHASES)]
    rows = [
        [
            method.name,
            f"{method.seconds:,.1f}",
            *(f"{method.phases[phase]:,.1f}" if phase in method.phases else "–" for phase in phases),
            f"{method.passes:,.0f}",
            f"{method.steps:,}",
            counted(*method.trainable),
            f"{method.memory / 2**20:,.0f}",
        ]
        for method in methods
    ]
    head = ["method", "seconds", *phases, "passes", "steps", "trainable", "peak MiB"]
    return Table("Cost, means over seeds", head, rows)


def _sweep(comparison: Comparison) -> Table:
    tried = {(one.method, one.rate): one for one in comparison.sweep}
    methods, rates = dict.fromkeys(one.method for one in comparison.sweep), sorted({rate for _, rate in tried})

    def cell(one: Tried | None) -> str:
        if one is None:
            return ""
        shown = "failed" if one.value is None else value_of(comparison.metric, one.value)
        return f"✓ {shown}" if one.chosen else shown

    return Table(
        f"Validation {words(comparison.metric)} by learning rate",
        ["method", *(f"{rate:g}" for rate in rates)],
        [[method, *(cell(tried.get((method, rate))) for rate in rates)] for method in methods],
    )


# ---------------------------------------------------------------------------------- figures


def difference_plot(comparison: Comparison) -> Drawn:
    """Each method's difference from the reference: its mean with the interval, and every seed as a small ring."""
    metric, reference, others = comparison.metric, comparison.reference, comparison.others
    scale = 100 if as_points(metric) else 1
    theirs = reference.by_seed(metric)
    rings = [
        (scale * (value - theirs[seed]), _label(method), f"seed {seed}")
        for method in others
        for seed, value in method.by_seed(metric).items()
        if seed in theirs
    ]
    seeds = go.Scatter(
        mode="markers",
        name="one seed",
        marker={"color": GREY, "size": 9, "symbol": "circle-open", "line": {"width": 1.5}},
        hovertemplate="%{text}: %{x:+.3~f}<extra></extra>",
        **dict(zip(("x", "y", "text"), zip(*rings, strict=True), strict=False)),
    )
    unit = "points" if as_points(metric) else words(metric)
    figure = framed(
        [seeds, *(_intervals(kind, others, metric, scale) for kind in VERDICTS)],
        height=_FRAME + _ROW * len(others),
        xaxis_title=plain(f"{unit}, minus {reference.name}"),
        yaxis=_rows(others),
    )
    figure.update_traces(showlegend=False, selector=lambda trace: not trace.x)
    figure.add_vline(x=0, line={"color": INK, "width": 1.5}, layer="below")
    text = "; ".join(f"{m.name} {gain_of(metric, *m.difference[:2])}" for m in others if m.difference)
    return Drawn("difference-plot", f"Difference from {reference.name}, seed by seed", text, figure)


def _intervals(kind: str, methods: Sequence[Method], metric: str, scale: int) -> go.Scatter:
    """Methods with one kind of verdict."""
    colour, symbol = VERDICTS[kind]
    shown = [(_label(m), m.difference) for m in methods if m.difference and verdict_of(m) == kind]
    return go.Scatter(
        mode="markers",
        name=kind,
        x=[scale * difference.mean for _, difference in shown],
        y=[label for label, _ in shown],
        error_x={
            "array": [scale * (difference.half or 0.0) for _, difference in shown],
            **{"type": "data", "color": colour, "thickness": 2.5, "width": 6},
        },
        marker={"color": colour, "size": 13, "symbol": symbol},
        text=[f"{gain_of(metric, d.mean, d.half)} over {d.n} seeds" for _, d in shown],
        hovertemplate="%{text}<extra></extra>",
    )


def quality_by_cost(comparison: Comparison, id: str, axis: str, cost: Callable[[Method], float]) -> Drawn:
    """A method's metric over its cost; best is the upper left, or the lower left for a loss."""
    metric = comparison.metric
    scale = 100 if as_points(metric) else 1
    traces = []
    for method, colour, symbol in zip(comparison.worked, cycle(_COLOURS), cycle(_SYMBOLS), strict=False):
        reached = method.metrics[metric]
        trace = go.Scatter(
            mode="markers",
            name=plain(method.name),
            x=[cost(method)],
            y=[scale * reached.mean],
            error_y={"type": "data", "array": [scale * (reached.half or 0.0)], "color": colour, "width": 5},
            marker={"color": colour, "size": 13, "symbol": symbol},
            hovertemplate=f"{plain(method.name)}<br>%{{x:,.4~s}}, %{{y:.4~f}}<extra></extra>",
        )
        traces.append(trace)
    measured = f"{comparison.split} {words(metric)}"
    figure = framed(
        traces,
        height=320 + 22 * len(traces),
        legend={"orientation": "v"},
        xaxis={"title": {"text": axis}, "rangemode": "tozero", "nticks": 6},
        yaxis_title=plain(f"{measured}{', %' if as_points(metric) else ''}"),
    )
    return Drawn(f"by-{id}", f"{measured} over {id}".capitalize(), "The table below has the numbers.", figure)


def _label(method: Method) -> str:
    """A name in two lines, for phones."""
    return plain(method.name).replace("+", "<br>+")


def _rows(methods: Sequence[Method]) -> dict[str, Any]:
    """An axis with a row per method, the first on top."""
    order = [_label(method) for method in methods]
    category = {"type": "category", "categoryorder": "array", "categoryarray": order}
    return {**category, "range": [len(order) - 0.5, -0.5], "showgrid": True, "fixedrange": True}
