"""What a run's looks at its rows found, in sentences: for the report and the model card."""

from collections.abc import Mapping
from typing import Any


def look_sentences(quality: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """For each look a heading, and sentences: the head, the gate, evidence of wrong labels, and rows that are kept.

    `quality` is that of run.json; a version without looks, and a run without any, gives an empty list.
    """
    trusted = quality.get("trusted_rows", 0)
    return [
        (
            f"Look {j} at all rows, before step {look.get('step', 0) + 1:,}",
            [
                *([_head(look.get("head_start"))] if j == 1 else []),
                *([f"Rows are drawn evenly and ranks stay: {look['not_ready']}."] if look.get("not_ready") else []),
                *_gate(look.get("gate"), trusted),
                *_noise(look.get("noise")),
                *([f"{look['kept']:,} of {look['rows']:,} rows were kept."] if "kept" in look else []),
                *([f"{trusted:,} trusted rows are trained on last."] if trusted and j == 1 else []),
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


def _gate(gate: Mapping[str, Any] | None, trusted: int) -> list[str]:
    if gate is None:
        return ["No gate was set: trusted rows left no row out."] if trusted else []
    if "why_not" in gate:
        return [f"The gate '{gate['name']}' was not used: {gate['why_not']}."]
    return [f"The gate '{gate['name']}' left out {gate['left_out']:,} rows, with which the trusted model disagrees."]


def _noise(noise: Mapping[str, Any] | None) -> list[str]:
    if noise is None:
        return []
    if not noise["evident"]:
        return [f"There is no evidence of wrong labels: at most {noise['high']:.1%}."]
    bounds = f"between {noise['low']:.0%} and {noise['high']:.0%}"
    return [f"About {noise['rate']:.0%} of the labels seem wrong, {bounds}; likely wrong ones are left out."]
