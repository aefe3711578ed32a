"""Choose the few hundred rows to look at from the scores, with their texts if available."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.errors import SettingsError
from tsqlora.quality.reasons import WHY, evident, likely_wrong, lowest, named, suspicion, texts_or_why
from tsqlora.quality.scores import REASONS, Scores

OF_A_KIND = 100
"""Rows per list; at most a third of all rows."""
LONGEST = 500
"""Characters of a text on the page."""


EVIDENT, DOUBTED = "likely wrong", "contradicted"
"""The mark of rows that the model contradicts with confidence, by whether there is evidence of wrong labels."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, with the names of its lists; `text` is None if it is not available.

    `prediction` is the predicted class with its probability; `numbers` are Q, p and the terms.
    """

    id: int
    lists: tuple[str, ...]
    text: str | None
    label: str
    prediction: str
    doubt: str | None
    """Among the marks, if the model contradicts the label with confidence."""
    reason: str
    numbers: list[float]

    @property
    def marks(self) -> list[str]:
        """The page's filters that show this row."""
        return [*self.lists, *filter(None, [self.doubt]), *["left out"] * (self.reason != "kept")]

    @property
    def why(self) -> str:
        """Why this row is shown."""
        more = {
            EVIDENT: "likely wrong label",
            DOUBTED: "the model contradicts the label",
            "left out": f"left out: {WHY[self.reason]}",
        }
        return ", ".join(more.get(mark, mark) for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows to look at; `without_texts` is why texts are missing, or None.

    `label` is the heading of the labels, "target tokens" for text. `reasons` counts all rows by reason, `likely_wrong`
    the rows for which the model predicts another class with confidence; None without predictions. `doubt` marks these.
    """

    rows: list[Sample]
    label: str
    terms: tuple[str, ...]
    all: int
    reasons: dict[str, int]
    likely_wrong: int | None
    doubt: str
    without_texts: str | None

    @property
    def lists(self) -> list[str]:
        """Names of the non-empty lists."""
        return list(dict.fromkeys(name for row in self.rows for name in row.lists))


def choose_samples(scores: Scores, texts: Sequence[str] | None = None) -> Samples:
    """The most and least valuable and the most suspicious rows, each list in its order.

    Raises SettingsError if there is not one text per row.
    """
    lists = _lists(scores)
    order = list(dict.fromkeys(int(j) for rows in lists.values() for j in rows))
    shown, why = texts_or_why(scores, order) if texts is None else (_texts_of(order, scores, texts), None)
    predicted = bool(scores.stratified and scores.predictions)
    wrong = likely_wrong(scores) if predicted else np.zeros(len(scores), dtype=np.bool_)
    codes, doubt = scores.reason_codes, EVIDENT if evident(scores) else DOUBTED
    within = {name: set(map(int, rows)) for name, rows in lists.items()}
    return Samples(
        rows=[
            _sample(scores, j, tuple(n for n in lists if j in within[n]), shown.get(j), doubt if wrong[j] else None)
            for j in order
        ],
        label="label" if scores.record.format is None else "target tokens",
        terms=tuple(scores.terms),
        all=len(scores),
        reasons={name: int((codes == code).sum()) for code, name in enumerate(REASONS)},
        likely_wrong=int(wrong.sum()) if predicted else None,
        doubt=doubt,
        without_texts=why,
    )


def _texts_of(rows: Sequence[int], scores: Scores, texts: Sequence[str]) -> dict[int, str]:
    if len(texts) != len(scores):
        raise SettingsError(f"{len(texts)} texts for {len(scores)} scored rows; pass one text per row, in order")
    return {j: str(texts[j]) for j in rows}


def _lists(scores: Scores) -> dict[str, np.ndarray]:
    """Rows by list; if all rows have the same quality, none is most or least valuable."""
    lists: dict[str, np.ndarray] = {}
    most = min(OF_A_KIND, math.ceil(len(scores) / 3))
    if np.ptp(scores.quality) > 0:
        lists["most valuable"] = np.argsort(-scores.quality, kind="stable")[:most]
        lists["least valuable"] = lowest(scores)[:most]
    if "loss" in scores.terms:
        lists["most suspicious"] = np.argsort(-suspicion(scores), kind="stable")[:most]
    return lists


def _sample(scores: Scores, j: int, lists: tuple[str, ...], text: str | None, doubt: str | None) -> Sample:
    predicted, sure = (scores.predictions.get(name) for name in ("predicted", "predicted_probability"))
    prediction = "" if predicted is None else _label(scores, predicted[j])
    return Sample(
        id=j if scores.ids is None else int(scores.ids[j]),
        lists=lists,
        text=None if text is None else _shortened(text),
        label=_label(scores, scores.labels[j]),
        prediction=prediction if sure is None else f"{prediction} ({sure[j]:.0%})",
        doubt=doubt,
        reason=REASONS[int(scores.reason_codes[j])],
        numbers=[float(values[j]) for values in (scores.quality, scores.probability, *scores.terms.values())],
    )


def _label(scores: Scores, value: Any) -> str:
    label = named(scores, value)
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def _shortened(text: str) -> str:
    end = LONGEST // 3  # the end of a generation sample is its target
    return text if len(text) <= LONGEST else f"{text[: LONGEST - end - 3]} … {text[-end:]}"
