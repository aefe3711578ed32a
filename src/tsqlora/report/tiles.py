"""The numbers at the top of a report."""

from datetime import UTC, datetime

from tsqlora.report import html
from tsqlora.report.comparison import Mean
from tsqlora.report.gather import Control, Gathered
from tsqlora.report.metrics import gain_of, value_of, words
from tsqlora.training.record import RunRecord


def tiles(known: Gathered) -> str:
    """Metric, seconds, share of the data, parameters, wrong labels."""
    record = known.record
    first = _metric(known) if record.status == "finished" else _running(record)
    found = (first, _seconds(record), _share(record), _parameters(record), _wrong_labels(known))
    return f'<dl class="tiles">{"".join(html.tile(*tile) for tile in found)}</dl>'


def _running(record: RunRecord) -> html.Tile:
    """How far a run is that has not finished, and what was measured last."""
    now, steps = record.now, record.plan["steps"]
    if not now:
        return "Training", "begun", [f"{steps:,} steps"]
    last: dict[str, float] = next((e for e in reversed(record.history) if any(n.startswith("eval_") for n in e)), {})
    measured = [
        f"validation {words(name.removeprefix('eval_'))} {value_of(name.removeprefix('eval_'), value)}"
        for name, value in last.items()
        if name.startswith("eval_")
    ]
    written = datetime.fromtimestamp(now["time"], UTC)
    more = [f"step {now['step']:,} of {steps:,}, {now['phase']}", f"as of {written:%H:%M:%S} UTC"]
    return "Training", f"{now['step'] / steps:.0%}", [*more, *measured]


def _metric(known: Gathered) -> html.Tile:
    split = "test" if "test" in known.record.metrics else "validation"
    metrics = known.record.metrics.get(split, {})
    if not metrics:
        return "Metric", "–", ["no labelled rows to measure on"]
    name, value = next(iter(metrics.items()))
    others = [f"{words(other)} {number:.3f}" for other, number in metrics.items() if other != name]
    rows = known.record.plan["rows"].get(split)
    on = [] if rows is None else [f"on {rows:,} {split} rows"]
    against = [_against(known, known.control, split, name, value)] if known.control else []
    return f"{split} {words(name)}".capitalize(), value_of(name, value), [*against, *on, *others]


def _against(known: Gathered, control: Control, split: str, name: str, value: float) -> str:
    theirs = control.record.metrics.get(split, {}).get(name)
    if theirs is None:
        return f"{control.name} has no {split} {words(name)}"
    same = control.record.data.get("hash") == known.record.data.get("hash")
    rows = "" if same else ", which had other rows"
    return f"{gain_of(name, Mean(value - theirs, None, 1))} against {control.name} ({value_of(name, theirs)}){rows}"


def _seconds(record: RunRecord) -> html.Tile:
    total = sum(phase.seconds for phase in record.cost.values())
    shown = f"{total:.0f} s" if total < 600 else f"{total / 60:.0f} min" if total < 36000 else f"{total / 3600:.0f} h"
    return "Time", shown, [f"{name} {phase.seconds:,.1f} s" for name, phase in record.cost.items()]


def _share(record: RunRecord) -> html.Tile:
    plan = record.plan
    rows, size = plan["rows"]["train"], plan["rows_an_epoch"]
    return (
        "Data an epoch",
        f"{size / rows:.0%}",
        [f"{size:,} of {rows:,} rows", f"{plan['epochs']} epochs, {plan['steps']:,} steps"],
    )


def _parameters(record: RunRecord) -> html.Tile:
    ranks = record.ranks.values()
    more = [f"in {len(ranks)} layers", f"ranks {min(ranks)} to {max(ranks)}"] if ranks else []
    return "Trainable parameters", f"{record.parameters.get('trainable', 0):,}", more


def _wrong_labels(known: Gathered) -> html.Tile:
    noise = known.record.quality.get("scores", {}).get("noise")
    doubted = None if known.samples is None else known.samples.likely_wrong
    title, doubts = "Wrong labels believed", "rows whose label the model surely doubts"
    if noise is None:
        return (title, "–", ["not estimated in this run"]) if doubted is None else (title, f"{doubted:,}", [doubts])
    also = [] if doubted is None else [f"{doubted:,} {doubts}"]
    if not noise["evident"]:
        return title, "none", ["no evidence of wrong labels", *also]
    return title, f"{noise['rate']:.0%}", [f"{noise['low']:.0%} to {noise['high']:.0%} of all", *also]
