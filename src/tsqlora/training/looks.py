"""When looks at all rows take place, and their summaries for run.json and the pages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState, TrainingArguments

from tsqlora.quality.epochs import trusted_steps
from tsqlora.quality.scores import Scores
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.recorder import step_size

LOOK_AGAIN = 1 / 3
"""Share of a run's steps after which all rows are looked at again, at the next epoch's beginning."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps of a run begin something."""

    trusted_step: int
    """From it on steps train on trusted rows; the run's last one where there are none."""
    trusted_from: tuple[int, int] | None
    """The same as an epoch and the place in it."""
    second_look: int | None
    """The epoch before which all rows are looked at again."""
    step_size: int
    """Rows of a step, of every process."""
    epoch_steps: int
    """Steps of an epoch."""

    @classmethod
    def of(cls, data: QualitySubset, args: TrainingArguments, state: TrainerState, batches: int) -> "Schedule":
        """Of a run whose epochs have so many batches."""
        a_step, accumulated, total = step_size(args, state), args.gradient_accumulation_steps, state.max_steps
        an_epoch = max(1, math.ceil(batches / accumulated))
        first = total - trusted_steps(total, data.plan.trusted, a_step)
        epoch, step = divmod(first, an_epoch)
        place = (epoch, min(step * a_step, len(data))) if first < total else None
        again = (e for e in range(1, math.ceil(total / an_epoch)) if LOOK_AGAIN * total <= e * an_epoch < first)
        return cls(first, place, next(again, None), a_step, an_epoch)


def look_summary(scores: Scores, why_not: str | None) -> dict[str, Any]:
    """A look for run.json."""
    names = ("epoch", "step", "head_start", "noise", "gate")
    summary = {name: getattr(scores.record, name) for name in names}
    return {**summary, "not_ready": why_not, "rows": len(scores), "kept": int(scores.kept.sum())}


def noise_notes(scores: Scores | None) -> list[str]:
    """The record's notes on wrong labels."""
    noise = None if scores is None else scores.record.noise
    if scores is None or noise is None:
        return []
    if not noise["evident"]:
        return ["there is no evidence of wrong labels: all rows were drawn from"]
    bounds = f" ({noise['low']:.0%} to {noise['high']:.0%})" if noise["high"] < 1 else ""
    left_out = scores.left_out_as("confident negative").sum()
    return [
        f"about {noise['rate']:.0%} of the labels seem wrong{bounds}: {left_out} of {len(scores)} rows were left out",
        *([scores.caution] if scores.caution else []),
    ]


def look_sentences(quality: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """For each look a heading, and sentences: the head, the gate, evidence of wrong labels, and rows that are kept.

    `quality` is that of run.json; a version without looks, and a run without any, gives an empty list.
    """
    trusted, last = quality.get("trusted_rows", 0), quality.get("trusted_from")
    return [
        (
            f"Look {j} at all rows, before step {look.get('step', 0) + 1:,}",
            [
                *([_head(look.get("head_start"))] if j == 1 else []),
                *([f"Rows are drawn evenly and ranks stay: {look['not_ready']}."] if look.get("not_ready") else []),
                *_gate(look.get("gate")),
                *_noise(look.get("noise")),
                *([f"{look['kept']:,} of {look['rows']:,} rows were kept."] if "kept" in look else []),
                *([trusted_order(trusted, last)] if trusted and j == 1 else []),
            ],
        )
        for j, look in enumerate(quality.get("looks", ()), start=1)
    ]


def _head(head: Mapping[str, Any] | None) -> str:
    if head is None:
        return "The head was left as it came: none was fitted."
    fitted, present = f"{head['out_of_fold_loss']:.3g}", f"{head['present_loss']:.3g}"
    if not head["replaced"]:
        return (
            f"The model's own head was kept: its loss is {present}, a fitted head's on rows it has not seen {fitted}."
        )
    rows = f"{head['rows']:,} {'trusted ' if head['trusted'] else ''}rows"
    dense = ", and the layer before it was whitened" if head["whitened"] else ""
    return (
        f"A head fitted on {rows} replaced the model's own{dense}: its loss on rows it has not seen is {fitted}, "
        f"that of the head that was there {present}."
    )


def _gate(gate: Mapping[str, Any] | None) -> list[str]:
    if gate is None:
        return []
    if "why_not" in gate:
        return [f"Not used ({gate['name']}): {gate['why_not']}."]
    return [f"The gate '{gate['name']}' left out {gate['left_out']:,} rows, with which the trusted model disagrees."]


def trusted_order(trusted: int, last: Any) -> str:
    """Whether so many trusted rows come last or are mixed in."""
    return f"{trusted:,} trusted rows are {'trained on last' if last else 'mixed in with those of the pool'}."


def _noise(noise: Mapping[str, Any] | None) -> list[str]:
    if noise is None:
        return []
    if not noise["evident"]:
        return ["There is no evidence of wrong labels, which does not mean that there are none."]
    bounds = f", between {noise['low']:.0%} and {noise['high']:.0%}" if noise["high"] < 1 else ""
    return [f"About {noise['rate']:.0%} of the labels seem wrong{bounds}; likely wrong ones are left out."]
