"""What was gathered of a comparison -> its page."""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from tsqlora.report import comparison_figures as figures
from tsqlora.report import html
from tsqlora.report.comparison import CHOSEN_ON_SHOWN, Comparison, Method, short
from tsqlora.report.metrics import gain_of, lower_is_better, mean_of, value_of, words
from tsqlora.report.page import Part, assemble

FEW = 3
"""Seeds below which a verdict is not given."""


def comparison_page(known: Comparison, script: str | None) -> str:
    """The page as one text; `script` as in `assemble`."""
    parts = _PARTS if known.worked else [part for part in _PARTS if part[0] in ("found", "settings")]
    return assemble(
        [(name, title, part(known)) for name, title, part in parts if name != "rates" or known.sweep],
        title=f"{known.name}: report of a comparison",
        name=known.name,
        about=f"{known.task} · {len(known.methods)} methods at equal {known.equal} · seeds {_listed(known.seeds)}",
        source="the comparison’s directory",
        script=script,
    )


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


# ------------------------------------------------------------------------------------ parts


def _summary(known: Comparison) -> Part:
    found = (_best(known), _better(known), _trainings(known), _quickest(known))
    return [f'<dl class="tiles">{"".join(html.tile(*tile) for tile in found)}</dl>'], {}


def _best(known: Comparison) -> html.Tile:
    metric = known.metric
    lower = lower_is_better(metric)
    best = (min if lower else max)(known.worked, key=lambda m: m.metrics[metric].mean)
    against = [] if best.difference is None else [f"{gain_of(metric, best.difference)} against {known.reference}"]
    return (
        f"{'Lowest' if lower else 'Highest'} mean",
        value_of(metric, best.metrics[metric].mean),
        [best.name, *against, best.verdict],
    )


def _better(known: Comparison) -> html.Tile:
    reference = next(m for m in known.methods if m.name == known.reference)
    theirs = mean_of(known.metric, reference.metrics[known.metric]) if reference.trained else "only failures"
    count = sum(figures.verdict_of(m) is figures.Verdict.BETTER for m in known.methods)
    others = f"of {len(known.methods) - 1} others than {known.reference}"
    return "Clearly better", str(count), [others, f"which has {theirs}"]


def _trainings(known: Comparison) -> html.Tile:
    failed = sum(len(m.failed) for m in known.methods)
    done = failed + sum(len(m.trained) for m in known.methods)
    of = f"{len(known.methods)} methods, seeds {_listed(known.seeds)}"
    return "Trainings", str(done), [of, f"{failed} failed" if failed else "none failed"]


def _quickest(known: Comparison) -> html.Tile:
    quickest = min(known.worked, key=_mean_seconds)
    spent = sum(t.seconds for m in known.worked for t in m.trained)
    return "Quickest", _seconds(_mean_seconds(quickest)), [quickest.name, f"all together {_seconds(spent)}"]


def _mean_seconds(method: Method) -> float:
    return sum(t.seconds for t in method.trained) / len(method.trained)


def _found(known: Comparison) -> Part:
    rows = [
        [
            method.name + _how_many_at_random(method),
            mean_of(known.metric, method.metrics[known.metric]) if method.trained else "–",
            gain_of(known.metric, method.difference) if method.difference else "–",
            method.verdict,
            len(method.trained),
        ]
        for method in known.methods
    ]
    heads = ["method", words(known.metric), f"minus {known.reference}", "which is", "seeds"]
    title = f"{known.split} {words(known.metric)}, mean ± 95 % interval".capitalize()
    return [html.bullets(_sentences(known)), html.table(title, heads, rows, numbers=(1, 2, 4))], {}


def _how_many_at_random(method: Method) -> str:
    count = len(method.at_random)
    return f" ({count} of {len(method.trained)} seeds drew at random)" if count else ""


def _sentences(known: Comparison) -> list[str]:
    """What the differences say, kind by kind, and what failed."""
    others = [method for method in known.worked if method.name != known.reference]
    said = []
    for kind, told in (
        (figures.Verdict.BETTER, "Better than {}"),
        (figures.Verdict.WORSE, "Worse than {}"),
        (figures.Verdict.NOISE, "No difference from {} that chance could not have made"),
        (figures.Verdict.UNKNOWN, "Too few seeds to tell from {}"),
    ):
        if of := [m for m in others if figures.verdict_of(m) is kind]:
            said.append(f"{told.format(known.reference)}: {'; '.join(_with_gain(known, m) for m in of)}.")
    if any(figures.verdict_of(m) is figures.Verdict.UNKNOWN for m in others):
        said.append(
            f"A verdict needs {FEW} seeds, since two may agree by chance: give the same compare command with further "
            "seeds; what is known is not run again."
        )
    for method in known.methods:
        said += [f"{method.name} failed with seed {seed}: {why}." for seed, why in method.failed.items()]
        said += [f"{method.name} drew rows at random with seed {s}: {why}." for s, why in method.at_random.items()]
    return said


def _with_gain(known: Comparison, method: Method) -> str:
    return method.name if method.difference is None else f"{method.name} ({gain_of(known.metric, method.difference)})"


def _differences(known: Comparison) -> Part:
    others = [m for m in known.worked if m.name != known.reference]
    if not others or not figures.by_seed(known, known.reference):
        return [html.paragraph("There is nothing to compare: only one method has results.", kind="missing")], {}
    said = "; ".join(f"{m.name} {gain_of(known.metric, m.difference)}" for m in others if m.difference)
    how = (
        "Large: the mean over seeds with its 95 % interval. Rings: each seed. Where the interval holds the line at 0, "
        "the difference may be chance."
    )
    place = html.figure("difference-plot", f"Difference from {known.reference}, seed by seed", said)
    return [html.paragraph(how, kind="how"), place], {"difference-plot": figures.difference_plot(known)}


def _seeds(known: Comparison) -> Part:
    said = f"{words(known.metric)} of each method by seed; the table below has the numbers."
    of = {m.name: figures.by_seed(known, m.name) for m in known.methods}
    rows = [
        [
            method.name,
            *(
                value_of(known.metric, of[method.name][seed])
                if seed in of[method.name]
                else ("failed" if seed in method.failed else "–")
                for seed in known.seeds
            ),
        ]
        for method in known.methods
    ]
    heads = ["method", *(f"seed {seed}" for seed in known.seeds)]
    how = "A line for each seed. Seeds differ in rows, head and batches, so compare methods along a line."
    return [
        html.paragraph(how, kind="how"),
        html.figure("seed-plot", f"{known.split} {words(known.metric)} by seed".capitalize(), said),
        html.table("By seed", heads, rows, numbers=range(1, len(heads)), narrow=True),
    ], {"seed-plot": figures.seed_plot(known)}


def _costs(known: Comparison) -> Part:
    drawn = {
        "by-seconds": figures.quality_by_cost(known, "seconds", _mean_seconds),
        "by-passes": figures.quality_by_cost(known, "passes of a row", figures.passes_of),
    }
    quality = f"{known.split} {words(known.metric)}"
    told = "The table below has the numbers."
    places = [
        html.figure("by-seconds", f"{quality} over seconds".capitalize(), told),
        html.figure("by-passes", f"{quality} over passes".capitalize(), told),
    ]
    phases = figures.phases_of(known)
    rows = [_cost_row(method, phases) for method in known.worked]
    heads = ["method", "seconds", *phases, "passes", "steps", "trainable", "peak MiB"]
    how = (
        f"The {'lower' if lower_is_better(known.metric) else 'upper'} left is best: much reached, little spent. "
        "Seconds are of one machine, and comparable only where "
        "nothing else ran; passes are rows forward and twice for rows backward. Bars: 95 % intervals."
    )
    if any(phases):
        drawn["phases"] = figures.phase_bars(known)
        places.append(html.figure("phases", "Mean seconds by phase", told))
    return [
        html.paragraph(how, kind="how"),
        f'<div class="grid">{"".join(places[:2])}</div>',
        *places[2:],
        html.table("Cost, means over seeds", heads, rows, numbers=range(1, len(heads))),
    ], drawn


def _cost_row(method: Method, phases: list[str]) -> list[Any]:
    seconds = figures.seconds_of(method)
    by_phase = [f"{seconds[phase]:,.1f}" if phase in seconds else "–" for phase in phases]
    memory = f"{method.memory / 2**20:,.0f}"
    return [
        method.name,
        f"{_mean_seconds(method):,.1f}",
        *by_phase,
        f"{figures.passes_of(method):,.0f}",
        f"{method.steps:,}",
        method.counted,
        memory,
    ]


def _metrics(known: Comparison) -> Part:
    names = list(dict.fromkeys(name for method in known.worked for name in method.metrics))
    rows = [[m.name, *(mean_of(n, m.metrics[n]) if n in m.metrics else "" for n in names)] for m in known.worked]
    heads = ["method", *map(words, names)]
    title = f"{known.split} rows, mean ± 95 % interval".capitalize()
    return [html.table(title, heads, rows, numbers=range(1, len(heads)))], {}


def _rates(known: Comparison) -> Part:
    rates = sorted({tried.rate for tried in known.sweep})
    cells = {(tried.method, tried.rate): tried for tried in known.sweep}

    def cell(method: str, rate: float) -> str:
        tried = cells.get((method, rate))
        if tried is None:
            return ""
        shown = "failed" if tried.value is None else value_of(known.metric, tried.value)
        return f"✓ {shown}" if tried.chosen else shown

    rows = [[m, *(cell(m, rate) for rate in rates)] for m in dict.fromkeys(t.method for t in known.sweep)]
    heads = ["method", *(f"{rate:g}" for rate in rates)]
    how = f"Every rate with seed {known.seeds[0]}; the one with ✓ was best on validation rows and used for all "
    how += "seeds: the smallest where every one failed."
    if known.chosen_on_shown:
        how += f" {CHOSEN_ON_SHOWN}"
    title = f"Validation {words(known.metric)} by learning rate"
    return [html.paragraph(how, kind="how"), html.table(title, heads, rows, numbers=range(1, len(heads)))], {}


def _command(known: Comparison) -> str:
    """That makes the comparison anew, as a shell takes it."""
    words = ["tsqlora", "compare", f"{known.name}/config.yaml"]
    words += ["--methods", ",".join(method.name for method in known.methods)]
    words += ["--seeds", ",".join(map(str, known.seeds)), "--equal", known.equal, "--metric", known.metric]
    if known.given.sweep:
        words += ["--lr-sweep", ",".join(map(str, known.given.sweep))]
    for name, rate in known.given.rates.items():
        words += ["--lr", f"{name}={rate}"]
    return shlex.join([*words, "--out", f"{known.name}-again"])


def _settings(known: Comparison) -> Part:
    rates = [[m.name, ", ".join(f"{rate:g}" for rate in m.learning_rates)] for m in known.methods]
    notes: Mapping[str, None] = dict.fromkeys(
        f"{m.name}, seed {t.seed}: {note}" for m in known.methods for t in m.trained for note in t.notes
    )
    seeds = f"with seed {known.methods[0].trained[0].seed}" if known.methods[0].trained else "that failed"
    return [
        html.paragraph("To repeat this comparison, beside its directory:"),
        html.code(_command(known)),
        html.folded("Notes of the trainings", html.bullets(list(notes))) if notes else "",
        html.folded(f"Settings of {known.methods[0].name} {seeds}", html.code(json.dumps(known.settings, indent=2))),
        html.table("Learning rate of each method", ["method", "rate"], rates, narrow=True),
        html.table("Versions", ["library", "version"], list(known.versions.items()), narrow=True),
        html.paragraph(f"Precision: {_listed(known.precisions) or 'not recorded'}"),
        html.paragraph(f"Commit: {_listed(list(map(short, known.commits))) or 'an installed package'}"),
        html.paragraph(f"Hash of the rows: {_listed(known.data) or 'not recorded'}"),
    ], {}


_PARTS: tuple[tuple[str, str, Callable[[Comparison], Part]], ...] = (
    ("summary", "Summary", _summary),
    ("found", "What was found", _found),
    ("differences", "Differences", _differences),
    ("seeds", "Seed by seed", _seeds),
    ("costs", "Cost against quality", _costs),
    ("metrics", "All metrics", _metrics),
    ("rates", "Learning rates", _rates),
    ("settings", "Settings, and how to repeat it", _settings),
)
