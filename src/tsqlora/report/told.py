"""What happened in a run, in plain words."""

from collections.abc import Mapping
from typing import Any

from tsqlora.ranks.events import MOST_EVENTS
from tsqlora.report.gather import Gathered
from tsqlora.training.record import RunRecord

_WHY = {
    "duplicate": "they repeat another row",
    "outlier": "their gradients are far larger than is usual in their class",
    "confident negative": "the model doubts their labels most, the same share of each class",
}


def what_happened(known: Gathered) -> list[str]:
    """A sentence for each thing that was decided."""
    record = known.record
    return [*_rows(record), *_quality(known), *_ranks(record, known.missing), *(note_of(n) for n in record.notes)]


def note_of(text: str) -> str:
    """A note as a sentence."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _rows(record: RunRecord) -> list[str]:
    plan = record.plan
    rows = plan["rows"]["train"]
    return [
        f"{rows:,} rows were there to learn from; each of {plan['epochs']} epochs trained on {plan['rows_an_epoch']:,} "
        f"of them ({plan['rows_an_epoch'] / rows:.0%}), in {plan['steps']:,} steps."
    ]


def _quality(known: Gathered) -> list[str]:
    quality, said = known.record.quality, []
    if tries := quality.get("attempts"):
        times = "once" if len(tries) == 1 else f"{len(tries)} times"
        said.append(f"Scoring was put off {times}, since the model had not learned enough: {tries[-1]}.")
    if "scores" in known.missing:
        return [*said, known.missing["scores"]]
    scores: Mapping[str, Any] = quality.get("scores", {})
    step = scored_at(known.record)
    when = "" if step is None else f" after {step:,} steps"
    said.append(f"Every row was scored{when}; {_drawn(scores)}" if scores else "Every row was scored.")
    if known.samples is None:
        return said
    left_out = {reason: count for reason, count in known.samples.reasons.items() if reason != "kept" and count}
    said += [f"{count:,} rows were left out because {_WHY[reason]} ({reason})." for reason, count in left_out.items()]
    if not left_out:
        said.append("No row was left out of the draws altogether.")
    return said


def _drawn(scores: Mapping[str, Any]) -> str:
    if scores.get("draw") == "even":
        return "all rows that were kept were drawn equally often."
    weights = ", ".join(f"{weight:+g} × {name.replace('_', ' ')}" for name, weight in scores.get("weights", {}).items())
    return f"rows were drawn by softmax(Q/τ) with τ = {scores.get('temperature', 1):g} and Q = {weights}, standardised."


def _ranks(record: RunRecord, missing: Mapping[str, str]) -> list[str]:
    if "events" in missing:
        return [missing["events"]]
    first, events = record.plan["ranks"], record.rank_events
    moved = sum(event.moved for event in events)
    # Of more than MOST_EVENTS every second one is kept.
    times = f"{'at least ' if len(events) > MOST_EVENTS // 2 else ''}{len(events):,} times"
    change = {layer: rank - first.get(layer, 0) for layer, rank in record.ranks.items()}
    if not any(change.values()):
        return [f"Ranks were looked at {times}, and {moved:,} slots moved; they ended as they began."]
    most, least = max(change, key=lambda name: change[name]), min(change, key=lambda name: change[name])
    return [
        f"Ranks were looked at {times}, between step {events[0].step:,} and step {events[-1].step:,}, and {moved:,} "
        f"slots moved in all. {most} gained most ({first.get(most, 0)} → {record.ranks[most]}), "
        f"{least} gave up most ({first.get(least, 0)} → {record.ranks[least]})."
    ]


def steps_an_epoch(record: RunRecord) -> float:
    """Optimizer steps of one epoch."""
    return record.plan["steps"] / record.plan["epochs"]


def scored_at(record: RunRecord) -> int | None:
    """The step before which rows were scored; None where they were not."""
    scores = record.quality.get("scores", {})
    if "step" in scores:
        return int(scores["step"])
    return round(scores["epoch"] * steps_an_epoch(record)) if "epoch" in scores else None
