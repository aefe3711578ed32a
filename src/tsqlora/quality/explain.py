"""Scores and the file they are of -> the samples to look at, with text, label, prediction and terms."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tsqlora.data.cells import row_hash, row_text
from tsqlora.data.dialect import Hints
from tsqlora.data.rows import Source, open_split
from tsqlora.errors import DataError
from tsqlora.quality.label_noise import reject
from tsqlora.quality.scores import REASONS, Scores

WHY = {
    "kept": "drawn from",
    "duplicate": "near-duplicate of another row",
    "outlier": "gradient far larger than is usual in its class",
    "confident negative": "likely wrong label",
    "gated": "the trusted model disagrees with its label",
    "trusted row": "its input equals a trusted row's",
}
"""Each of REASONS in plain words; all but the first are reasons why a row is left out."""


def suspicion(scores: Scores) -> Float[np.ndarray, " n"]:
    """How likely each label is wrong, as an order: the calibrated loss above the median of its class.

    A class that is hard as a whole is not suspected as a whole. Of a regression, the loss.
    docs/research/log.md compares it with other measures.
    """
    loss = scores.terms["loss"].astype(np.float64)
    groups = np.zeros(len(scores), dtype=np.int64) if scores.strata is None else scores.strata
    for group in np.unique(groups):
        loss[groups == group] -= np.median(loss[groups == group])
    return loss


def likely_wrong(scores: Scores) -> Bool[np.ndarray, " n"]:
    """Rows of which the model says another class, as surely as it says that class of those labelled so.

    As surely: with at least the mean probability that it gives the label of the class's rows
    (Northcutt et al., 2021, confident learning).  None for a regression.
    """
    if not scores.stratified:
        return np.zeros(len(scores), dtype=np.bool_)
    said, sure = scores.predictions["predicted"], scores.predictions["predicted_probability"]
    own, labels = scores.predictions["label_probability"], scores.labels
    usual = {c: own[labels == c].mean() if (labels == c).any() else np.inf for c in np.unique(said)}
    return (said != labels) & (sure >= np.array([usual[c] for c in said]))


def explain(scores: Scores, n: int, *, data: Path | None = None) -> dict[str, Any]:
    """The n samples of highest and lowest quality, the most suspicious, and likely wrong labels, as plain JSON.

    Texts are looked up by hash in `data`, by default the file that the scores name.
    Raises DataError where scores do not say enough, or the file lacks a row.
    """
    if "loss" not in scores.terms or (scores.stratified and not scores.predictions):
        raise DataError("these scores do not say what the model predicts; score anew")
    order, by_suspicion = np.argsort(-scores.quality, kind="stable"), np.argsort(-suspicion(scores), kind="stable")
    wrong = by_suspicion[likely_wrong(scores)[by_suspicion]]
    lists = {
        "highest": order[:n],
        "lowest": order[::-1][:n],
        "suspicious": by_suspicion[:n],
        "likely_wrong": wrong[:n],
    }
    texts = _texts(scores, np.unique(np.concatenate(list(lists.values()))), _source(scores, data))
    samples = {name: [_sample(scores, int(j), texts[int(j)]) for j in rows] for name, rows in lists.items()}
    return {**samples, "likely_wrong_rows": len(wrong)}


def place_of(scores: Scores, row: int) -> int:
    """The place in the scores of the row with this id.  Raises DataError where it was not scored."""
    ids = np.arange(len(scores)) if scores.ids is None else scores.ids
    found = np.flatnonzero(ids == row)
    if len(found) == 0:
        raise DataError(
            f"row {row} is none of the {len(scores):,} scored rows, whose numbers go from {ids.min()} to {ids.max()}; "
            "it was held out or left out, or is of another file"
        )
    return int(found[0])


def explain_row(scores: Scores, row: int, *, data: Path | None = None) -> dict[str, Any]:
    """What is known of the row with this id, and why it is drawn from or left out, as plain JSON.

    Its text is None where its file does not have it. Raises DataError for a row that was not scored.
    """
    j = place_of(scores, row)
    doubts = doubt(scores)
    return {
        **_sample(scores, j, texts_or_why(scores, [j], data)[0].get(j)),
        "why": WHY[REASONS[0 if scores.reasons is None else int(scores.reasons[j])]],
        "wrong_probability": None if doubts is None else float(doubts[j]),
        "out_of_sample": scores.record.out_of_sample,
    }


def doubt(scores: Scores) -> Float[np.ndarray, " n"] | None:
    """The chance that each label is wrong, where that was estimated; 0 for all without evidence of wrong labels."""
    if scores.record.noise is None or "logits" not in scores.predictions:
        return None
    logits, labels = scores.predictions["logits"], scores.labels
    _, noise = reject(logits, labels, frozen=scores.record.frozen)
    return noise.doubt(logits, labels) if noise.evident else np.zeros(len(scores))


def _source(scores: Scores, data: Path | None) -> Source:
    named = data if data is not None else scores.record.data
    if named is None or scores.hashes is None or scores.record.columns is None:
        raise DataError("these scores do not name the rows they are of; name the file: --data FILE")
    return open_split(named, split="train", hints=hints_of(scores))


def hints_of(scores: Scores) -> Hints:
    """What the settings said of how the scored file is written."""
    return Hints(**scores.record.hints)


def find_texts(scores: Scores, rows: Iterable[int], source: Source) -> dict[int, str]:
    """The text of each of these rows that the source still has; texts of a pair and messages are a line each.

    Where a text was to be written, it follows behind an arrow.
    """
    columns = scores.record.columns
    assert scores.hashes is not None
    assert columns is not None
    written = columns["label"] if scores.record.format is not None else None
    hashes = {int(j): scores.hashes[j] for j in rows}
    wanted = set(hashes.values())
    found: dict[str, str] = {}
    for chunk in source.chunks():
        for row in chunk.rows:
            if (name := row_hash(row, columns)) in wanted:
                target = "" if written is None else f"\n→ {row.get(written)}"
                found[name] = row_text(row, columns) + target
    return {j: found[name] for j, name in hashes.items() if name in found}


def texts_or_why(scores: Scores, rows: Iterable[int], data: Path | None = None) -> tuple[dict[int, str], str | None]:
    """The texts that are found, and why others are not. Only files are looked into: a hub id would be a request."""
    named, wanted = data or scores.record.data, list(rows)
    if scores.hashes is None or named is None or scores.record.columns is None:
        return {}, "the scores do not name the rows they are of; give their texts: tsq.report(DIRECTORY, texts=[...])"
    if not Path(named).exists():
        return {}, f"{named} is not on this machine"
    try:
        found = find_texts(scores, wanted, open_split(named, split="train", hints=hints_of(scores)))
    except (DataError, OSError, UnicodeError) as error:
        return {}, f"{named} cannot be read ({error})"
    if missing := len(wanted) - len(found):
        return found, f"{named} has changed and lacks {missing} of these rows"
    return found, None


def _texts(scores: Scores, rows: np.ndarray, source: Source) -> dict[int, str]:
    """The text of each of these rows."""
    found = find_texts(scores, rows.tolist(), source)
    if missing := len(rows) - len(found):
        raise DataError(f"{source.name} lacks {missing} of the rows that were scored; name that file: --data FILE")
    return found


def _sample(scores: Scores, j: int, text: str | None) -> dict[str, Any]:
    names, said = scores.record.classes, scores.predictions.get("predicted")

    def label(value: Any) -> Any:
        return value.item() if names is None else names[int(value)]

    sure = ("predicted_probability", "label_probability")
    return {
        "id": j if scores.ids is None else int(scores.ids[j]),
        "text": text,
        "label": label(scores.labels[j]),
        **({} if said is None else {"predicted": label(said[j])}),
        **{name: float(scores.predictions[name][j]) for name in sure if name in scores.predictions},
        "quality": float(scores.quality[j]),
        "reason": REASONS[0 if scores.reasons is None else int(scores.reasons[j])],
        "terms": {name: float(values[j]) for name, values in scores.terms.items()},
    }
