"""Choose the few hundred rows to look at from the scores, with their texts if available."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.auditing.reasons import WHY, evident, likely_wrong, lists_of, named, texts_or_why
from tsqlora.auditing.scores import REASONS, Scores
from tsqlora.errors import SettingsError

OF_A_KIND = 100
"""Rows per list; at most a third of all rows."""
LONGEST = 500
"""Characters of a text on the page."""
LISTS = {"suspicious": "most suspicious", "highest": "highest Q", "lowest": "lowest Q"}
EVIDENT, DOUBTED = "likely wrong", "contradicted"
"""The mark of rows that the model contradicts with confidence, by whether there is evidence of wrong labels."""
PHRASES = {EVIDENT: "likely wrong label", DOUBTED: "the model contradicts the label"}


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows to look at, as values for the page; `without_texts` is why texts are missing, or None.

    `label` is the heading of the labels, "target tokens" for text. `reasons` counts all rows by reason, `likely_wrong`
    the rows for which the model predicts another class with confidence; None without predictions. `doubt` marks these.
    """

    rows: list[dict[str, Any]]
    lists: list[str]
    """Names of the non-empty lists."""
    label: str
    terms: tuple[str, ...]
    all: int
    reasons: dict[str, int]
    likely_wrong: int | None
    doubt: str
    without_texts: str | None


def choose_samples(scores: Scores, texts: Sequence[str] | None = None) -> Samples:
    """The most suspicious rows and those of highest and lowest Q, each list in its order.

    If all rows have the same Q, there are no lists of it. Raises SettingsError if there is not one text
    per row.
    """
    chosen = lists_of(scores, min(OF_A_KIND, math.ceil(len(scores) / 3)))
    same = np.ptp(scores.quality) == 0
    lists = {
        title: chosen[name].tolist()
        for name, title in LISTS.items()
        if name in chosen and (name == "suspicious" or not same)
    }
    order = list(dict.fromkeys(j for rows in lists.values() for j in rows))
    if texts is not None and len(texts) != len(scores):
        raise SettingsError(f"{len(texts)} texts for {len(scores)} scored rows; pass one text per row, in order")
    shown, why = texts_or_why(scores, order) if texts is None else ({j: str(texts[j]) for j in order}, None)
    predicted = bool(scores.stratified and scores.predictions)
    wrong = likely_wrong(scores) if predicted else np.zeros(len(scores), dtype=np.bool_)
    doubt = EVIDENT if evident(scores) else DOUBTED
    predictions, sure = (scores.predictions.get(name) for name in ("predicted", "predicted_probability"))
    rows, columns = list[dict[str, Any]](), (scores.quality, scores.probability, *scores.terms.values())
    for j in order:
        text, reason = shown.get(j), REASONS[int(scores.reason_codes[j])]
        if text is not None and len(text) > LONGEST:
            end = LONGEST // 3  # the end of a generation sample is its target
            text = f"{text[: LONGEST - end - 3]} … {text[-end:]}"
        marks = [name for name, own in lists.items() if j in own] + [doubt] * bool(wrong[j])
        phrases = [PHRASES.get(mark, mark) for mark in marks]
        prediction = "" if predictions is None else _label(scores, predictions[j])
        row = {
            "id": int(scores.row_ids[j]),
            "text": text,
            "label": _label(scores, scores.labels[j]),
            "prediction": prediction if sure is None else f"{prediction} ({sure[j]:.0%})",
            "doubt": bool(wrong[j]),
            "numbers": [float(values[j]) for values in columns],
            # The page's filters that show this row, and why it is shown.
            "marks": marks + ["left out"] * (reason != "kept"),
            "why": ", ".join(phrases + [f"left out: {WHY[reason]}"] * (reason != "kept")),
        }
        rows.append(row)
    return Samples(
        rows=rows,
        lists=[name for name in lists if lists[name]],
        label="label" if scores.record.format is None else "target tokens",
        terms=tuple(scores.terms),
        all=len(scores),
        reasons={name: int((scores.reason_codes == code).sum()) for code, name in enumerate(REASONS)},
        likely_wrong=int(wrong.sum()) if predicted else None,
        doubt=doubt,
        without_texts=why,
    )


def _label(scores: Scores, value: Any) -> str:
    label = named(scores, value)
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.4g}" if isinstance(label, float) else str(label)
