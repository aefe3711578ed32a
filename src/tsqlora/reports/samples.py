"""Scores -> the few hundred rows that are worth a look, with their texts where those can be found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.errors import SettingsError
from tsqlora.quality.explain import WHY, likely_wrong, suspicion, texts_or_why
from tsqlora.quality.scores import REASONS, Scores

OF_A_KIND = 100
"""Rows of each list, at most a third of all."""
LONGEST = 500
"""Characters of a text that are shown."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: `lists` are those that it is in, `text` is None where it was not found.

    `prediction` is the class that the model says, with its probability; `numbers` are Q, p and the terms.
    """

    id: int
    lists: tuple[str, ...]
    text: str | None
    label: str
    prediction: str
    likely_wrong: bool
    reason: str
    numbers: list[float]

    @property
    def marks(self) -> list[str]:
        """The names under which the page's selection shows this row."""
        wrong, left_out = ["likely wrong"] * self.likely_wrong, ["left out"] * (self.reason != "kept")
        return [*self.lists, *wrong, *left_out]

    @property
    def why(self) -> str:
        """Why this row is shown."""
        more = {"likely wrong": "likely wrong label", "left out": f"left out: {WHY[self.reason]}"}
        return ", ".join(more.get(mark, mark) for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows to look at; `without_texts` says why texts are missing, None where none is.

    `label` is what a row's label is, the model having nothing to say of it where that is a count of target tokens.
    `reasons` counts all rows by why they were kept or left out, `likely_wrong` all rows of
    which the model surely says another class: None where that is not known.
    """

    rows: list[Sample]
    label: str
    terms: tuple[str, ...]
    all: int
    reasons: dict[str, int]
    likely_wrong: int | None
    without_texts: str | None

    @property
    def lists(self) -> list[str]:
        """Names of the lists that have rows."""
        return list(dict.fromkeys(name for row in self.rows for name in row.lists))


def choose_samples(scores: Scores, texts: Sequence[str] | None = None) -> Samples:
    """The most and the least valuable rows, and the most suspicious ones, best known by their list's order.

    Raises SettingsError for texts that are not those of the rows.
    """
    lists = _lists(scores)
    order = list(dict.fromkeys(int(j) for rows in lists.values() for j in rows))
    found, why = texts_or_why(scores, order) if texts is None else (_texts_of(order, scores, texts), None)
    known = bool(scores.stratified and scores.predictions)
    wrong = likely_wrong(scores) if known else np.zeros(len(scores), dtype=np.bool_)
    codes = scores.reason_codes
    within = {name: set(map(int, rows)) for name, rows in lists.items()}
    return Samples(
        rows=[
            _sample(scores, j, tuple(name for name in lists if j in within[name]), found.get(j), bool(wrong[j]))
            for j in order
        ],
        label="label" if scores.record.format is None else "target tokens",
        terms=tuple(scores.terms),
        all=len(scores),
        reasons={name: int((codes == code).sum()) for code, name in enumerate(REASONS)},
        likely_wrong=int(wrong.sum()) if known else None,
        without_texts=why,
    )


def _texts_of(rows: Sequence[int], scores: Scores, texts: Sequence[str]) -> dict[int, str]:
    if len(texts) != len(scores):
        raise SettingsError(f"there are {len(texts)} texts for {len(scores)} scored rows; give one for each, in order")
    return {j: str(texts[j]) for j in rows}


def _lists(scores: Scores) -> dict[str, np.ndarray]:
    """Rows by list; where all rows are worth the same, none is most or least valuable."""
    lists: dict[str, np.ndarray] = {}
    most = min(OF_A_KIND, math.ceil(len(scores) / 3))
    if np.ptp(scores.quality) > 0:
        order = np.argsort(-scores.quality, kind="stable")
        lists["most valuable"] = order[:most]
        lists["least valuable"] = order[::-1][:most]
    if "loss" in scores.terms:
        lists["most suspicious"] = np.argsort(-suspicion(scores), kind="stable")[:most]
    return lists


def _sample(scores: Scores, j: int, lists: tuple[str, ...], text: str | None, wrong: bool) -> Sample:
    predicted, sure = (scores.predictions.get(name) for name in ("predicted", "predicted_probability"))
    says = "" if predicted is None else _label(scores, predicted[j])
    return Sample(
        id=j if scores.ids is None else int(scores.ids[j]),
        lists=lists,
        text=None if text is None else _shortened(text),
        label=_label(scores, scores.labels[j]),
        prediction=says if sure is None else f"{says} ({sure[j]:.0%})",
        likely_wrong=wrong,
        reason=REASONS[int(scores.reason_codes[j])],
        numbers=[float(values[j]) for values in (scores.quality, scores.probability, *scores.terms.values())],
    )


def _label(scores: Scores, value: Any) -> str:
    names = scores.record.classes
    if names is not None:
        return str(names[int(value)])
    number = value.item()
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _shortened(text: str) -> str:
    end = LONGEST // 3  # of a text that is to be written, its end is the target
    return text if len(text) <= LONGEST else f"{text[: LONGEST - end - 3]} … {text[-end:]}"
