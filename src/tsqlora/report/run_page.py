"""What was gathered of a run -> its page: the same bytes for the same run."""

from collections.abc import Callable
from shlex import quote
from typing import Any

from tsqlora.report import figures, html, told
from tsqlora.report.gather import Gathered
from tsqlora.report.page import Part, assemble
from tsqlora.report.sample_table import sample_table
from tsqlora.report.tiles import tiles


def run_page(known: Gathered, script: str | None) -> str:
    """The page as one text; `script` as in `assemble`."""
    return assemble(
        [(name, title, part(known)) for name, title, part in _PARTS],
        title=f"{known.name}: report of a run",
        name=known.name,
        about=_about(known),
        source="the run’s directory",
        script=script,
        frames=figures.rank_frames(known.record.plan["ranks"], known.record.rank_events),
    )


def _about(known: Gathered) -> str:
    model, data = (str(known.config.get(s, {}).get(k)) for s, k in (("model", "path"), ("data", "train")))
    return f"{known.record.task} · {_last(model)} on {_last(data)} · seed {known.record.seed}"


def _last(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _summary(known: Gathered) -> Part:
    return [tiles(known)], {}


def _happened(known: Gathered) -> Part:
    return [html.bullets(told.what_happened(known))], {}


def _curves(known: Gathered) -> Part:
    if why := known.missing.get("history"):
        return [html.paragraph(why, kind="missing")], {}
    record = known.record
    scored = told.scored_at(record)
    marks: dict[str, Any] = {"scored": scored, "warmup": scored, "events": record.rank_events}
    drawn = {"loss": figures.loss_curve(record.history, **marks)}
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    fell = f" It went from {losses[0]:.3g} to {losses[-1]:.3g}." if losses else ""
    places = [html.figure("loss", "Loss", f"Training and validation loss by step.{fell}")]
    if (metric := figures.metric_curve(record.history, **marks)) is not None:
        drawn["metric"] = metric
        places.append(html.figure("metric", "Metrics of the validation rows", "Validation metrics by step."))
    how = "Shaded: warm-up on random draws. Dashed: scoring of every row. Triangles: adjustments of the ranks."
    return [html.paragraph(how, kind="how"), *places, _history_table(known)], drawn


def _history_table(known: Gathered) -> str:
    history = figures.thinned(known.record.history, 60)
    names = list(dict.fromkeys(n for entry in history for n in entry if n not in ("step", "epoch")))
    rows = [[f"{entry['step']:,}", *(f"{entry[n]:.4g}" if n in entry else "" for n in names)] for entry in history]
    shown = html.table("What was logged", ["step", *names], rows, numbers=range(1, len(names) + 1))
    return html.folded("The curves as a table", shown)


def _ranks(known: Gathered) -> Part:
    record, events = known.record, known.record.rank_events
    if not events:
        return [html.paragraph(known.missing["events"], kind="missing")], {}
    grid = figures.Grid(list(record.plan["ranks"]))
    said = f"Ranks of {len(record.ranks)} layers by block and kind of module; the table below has them all."
    more = "" if len(events) <= figures.FRAMES else f" Of {len(events):,} adjustments, {figures.FRAMES} are shown."
    how = "The number is the rank that a layer has; move the slider to see it change." + more
    last = min(len(events), figures.FRAMES - 1)
    slider = (
        '<div class="slider"><button type="button" id="play" aria-pressed="false">Play</button>'
        f'<label for="frame">Adjustment</label><input type="range" id="frame" min="0" max="{last}" value="{last}">'
        '<output id="frame-said" for="frame"></output></div>'
    )
    rows = [
        [kind, *("" if rank is None else rank for rank in ranks)]
        for kind, ranks in zip(grid.kinds, grid.rows(record.ranks), strict=True)
    ]
    numbers = range(1, len(grid.blocks) + 1)
    as_table = html.folded(
        "The last ranks as a table", html.table("Rank by block", ["kind", *grid.blocks], rows, numbers=numbers)
    )
    drawn = {"ranks-map": figures.rank_map(record.plan["ranks"], events)}
    return [html.paragraph(how, kind="how"), slider, html.figure("ranks-map", "Rank map", said), as_table], drawn


def _sensitivity(known: Gathered) -> Part:
    events = [event for event in known.record.rank_events if event.sensitivity]
    if not events:
        return [html.paragraph("No sensitivities were measured in this run.", kind="missing")], {}
    first, last = figures.shares(events[0]), figures.shares(events[-1])
    most = max([*first.values(), *last.values()])
    drawn = {
        "sensitivity-first": figures.sensitivity_map(events[0], most=most),
        "sensitivity-last": figures.sensitivity_map(events[-1], most=most),
    }
    top = max(last, key=lambda layer: last[layer])
    said = f"At the end, {top} has the largest share, {last[top]:.1f} %."
    rows = [[layer, f"{first.get(layer, 0):.2f}", f"{last[layer]:.2f}"] for layer in last]
    return [
        html.paragraph(
            "How much of the loss hangs on each layer: its share of the sum over all layers, in percent.", kind="how"
        ),
        html.figure("sensitivity-first", f"First, at step {events[0].step:,}", "Sensitivity by layer at first."),
        html.figure("sensitivity-last", f"Last, at step {events[-1].step:,}", f"Sensitivity by layer at last. {said}"),
        html.folded(
            "Sensitivity as a table", html.table("Share in percent", ["layer", "first", "last"], rows, numbers=(1, 2))
        ),
    ], drawn


def _distributions(known: Gathered) -> Part:
    if known.distributions is None:
        return [html.paragraph(known.missing["scores"], kind="missing")], {}
    places: list[str] = []
    drawn: dict[str, figures.Figure] = {}
    for j, found in enumerate(known.distributions):
        name = {"quality": "Q, the quality", "probability": "p, the probability of a draw"}.get(
            found.name, found.name.replace("_", " ")
        )
        drawn[f"histogram-{j}"] = figures.histogram(found)
        least, most = f"{found.least:.4g}", f"{found.most:.4g}"
        range_ = f"each {least}" if least == most else f"from {least} to {most}"
        said = f"{name} of {sum(found.kept):,} kept and {sum(found.left_out):,} left-out rows, {range_}."
        places.append(html.figure(f"histogram-{j}", f"{name} ({range_})", said))
    how = "Shares of the kept rows (bars) and of the left-out ones (line). The outermost bins hold what lies beyond."
    return [html.paragraph(how, kind="how"), f'<div class="grid">{"".join(places)}</div>'], drawn


def _samples(known: Gathered) -> Part:
    if known.samples is None:
        return [html.paragraph(known.missing["scores"], kind="missing")], {}
    return [sample_table(known.samples)], {}


def _cost(known: Gathered) -> Part:
    cost = known.record.cost
    rows = [[n, f"{c.seconds:,.1f}", f"{c.forward:,}", f"{c.backward:,}", f"{c.tokens:,}"] for n, c in cost.items()]
    shown = html.table(
        "Cost by phase", ["phase", "seconds", "rows forward", "rows backward", "tokens"], rows, numbers=(1, 2, 3, 4)
    )
    said = ", ".join(f"{name} {phase.seconds:.1f} seconds" for name, phase in cost.items())
    return [html.figure("cost-bars", "Seconds by phase", said), shown], {"cost-bars": figures.cost_bars(cost)}


def _settings(known: Gathered) -> Part:
    versions = html.table("Versions", ["library", "version"], list(known.record.versions.items()), narrow=True)
    metrics = [
        [split, name, f"{value:.4f}"] for split, found in known.record.metrics.items() for name, value in found.items()
    ]
    return [
        html.paragraph("To repeat this run, beside its directory:"),
        html.code(f"tsqlora train {quote(known.name)}/config.yaml --out {quote(known.name)}-again"),
        html.folded("Settings (config.yaml)", html.code(known.settings)),
        html.table("Metrics", ["rows", "metric", "value"], metrics, numbers=(2,), narrow=True) if metrics else "",
        versions,
        html.paragraph(f"Hash of the rows: {known.record.data.get('hash', 'not recorded')}"),
    ], {}


_PARTS: tuple[tuple[str, str, Callable[[Gathered], Part]], ...] = (
    ("summary", "Summary", _summary),
    ("happened", "What happened", _happened),
    ("curves", "Learning curves", _curves),
    ("ranks", "Ranks", _ranks),
    ("sensitivity", "Sensitivity", _sensitivity),
    ("distributions", "Distributions", _distributions),
    ("samples", "Samples to look at", _samples),
    ("cost", "Cost", _cost),
    ("settings", "Settings, and how to repeat it", _settings),
)
