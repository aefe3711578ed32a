"""The page of a run; the same run gives the same bytes."""

from datetime import UTC, datetime
from shlex import quote
from typing import Any

from tsqlora.quality.reasons import WHY
from tsqlora.reports import figures
from tsqlora.reports.gather import Gathered
from tsqlora.reports.page import Table, render
from tsqlora.training.record import MOST_EVENTS, RunRecord, look_sentences

LOGGED = 60
"""Rows of the table of the log."""


def run_page(run: Gathered, script: str) -> str:
    """Render the page; `script` as in `render`."""
    record, events = run.record, run.record.rank_events
    measured = [event for event in events if event.sensitivity]
    scored = scored_at(record)
    drawn = {
        "curves": figures.curves(record.history, looks=scored, events=events) if record.history else [],
        "ranks": [figures.rank_map(record.plan["ranks"], events)] if events else [],
        "sensitivity": figures.sensitivity_maps(measured) if measured else [],
        "distributions": run.scores.histograms if run.scores else [],
    }
    return render(
        "run.html",
        script=script,
        figures=[figure for part in drawn.values() for figure in part],
        frames=figures.rank_frames(record.plan["ranks"], events),
        drawn=drawn,
        title=f"{run.name}: report of a run",
        name=run.name,
        about=_about(run),
        run=run,
        record=record,
        plan=record.plan,
        samples=run.scores.samples if run.scores else None,
        scored=scored,
        epochs=_epochs(record.plan.get("epochs", 0)),
        looks_text=look_sentences(record.quality),
        why=WHY,
        command=f"tsqlora train {quote(run.name)}/config.yaml --out {quote(run.name)}-again",
        tables=_tables(record),
        **_progress(record),
        **_ranks(record),
    )


def _about(run: Gathered) -> str:
    model, data = (str(run.config.get(s, {}).get(k)) for s, k in (("model", "path"), ("data", "train")))
    return f"{run.record.task} · {_last(model)} on {_last(data)} · seed {run.record.seed}"


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def _last(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def scored_at(record: RunRecord) -> list[int]:
    """Steps after which rows were scored."""
    if "looks" in record.quality:
        return [look["step"] for look in record.quality["looks"] if "kept" in look]
    scores = record.quality.get("scores", {})
    if "step" in scores:
        return [int(scores["step"])]
    return [round(scores["epoch"] * record.plan["steps"] / record.plan["epochs"])] if "epoch" in scores else []


def _progress(record: RunRecord) -> dict[str, Any]:
    """The latest evaluation of an unfinished run, and the time of its record."""
    last = next((e for e in reversed(record.history) if any(n.startswith("eval_") for n in e)), {})
    return {
        "evaluated": {n.removeprefix("eval_"): value for n, value in last.items() if n.startswith("eval_")},
        "written": f"{datetime.fromtimestamp(record.now['time'], UTC):%H:%M:%S} UTC" if record.now else None,
    }


def _ranks(record: RunRecord) -> dict[str, Any]:
    """How often ranks were adjusted, and the layers that gained and lost most, if any."""
    first, last, events = record.plan["ranks"], record.ranks, record.rank_events
    change = {layer: rank - first.get(layer, 0) for layer, rank in last.items()}
    layers = (
        [max(change, key=lambda n: change[n]), min(change, key=lambda n: change[n])] if any(change.values()) else []
    )
    return {
        # Beyond MOST_EVENTS, only every second event is recorded.
        "looks": f"{'at least ' if len(events) > MOST_EVENTS // 2 else ''}{len(events):,} times",
        "most_frames": figures.FRAMES,
        "extremes": [{"layer": layer, "first": first.get(layer, 0), "last": last[layer]} for layer in layers],
    }


def _tables(record: RunRecord) -> dict[str, Table]:
    grid, events = figures.Grid(list(record.plan["ranks"])), [e for e in record.rank_events if e.sensitivity]
    ranks = [
        [kind, *("" if rank is None else rank for rank in ranks)]
        for kind, ranks in zip(grid.kinds, grid.rows(record.ranks), strict=True)
    ]
    first, last = (figures.shares(events[j]) if events else {} for j in (0, -1))
    shares = [[layer, f"{first.get(layer, 0):.2f}", f"{share:.2f}"] for layer, share in last.items()]
    cost = [
        [name, f"{phase.seconds:,.1f}", f"{phase.forward:,}", f"{phase.backward:,}", f"{phase.tokens:,}"]
        for name, phase in record.cost.items()
    ]
    metrics = [[split, n, f"{value:.4f}"] for split, values in record.metrics.items() for n, value in values.items()]
    return {
        "history": _log(record),
        "ranks": Table("Rank by block", ["kind", *grid.blocks], ranks),
        "sensitivity": Table("Share in percent", ["layer", "first", "last"], shares),
        "cost": Table("Cost by phase", ["phase", "seconds", "rows forward", "rows backward", "tokens"], cost),
        "metrics": Table("Metrics", ["rows", "metric", "value"], metrics, texts=[1]),
        "versions": Table("Versions", ["library", "version"], list(record.versions.items()), texts=[1]),
    }


def _log(record: RunRecord) -> Table:
    """The losses and metrics that the Trainer logged, a row for each step."""
    history = figures.thinned(record.history, LOGGED)
    names = list(dict.fromkeys(n for entry in history for n in entry if n not in ("step", "epoch")))
    rows = [[f"{entry['step']:,}", *(f"{entry[n]:.4g}" if n in entry else "" for n in names)] for entry in history]
    return Table("Log", ["step", *names], rows)
