"""Explain scores and runs: the rows worth reading, with text, label, prediction and terms; why a row was drawn."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from tsqlora.auditing.draw.epochs import EpochPlan
from tsqlora.auditing.scores import REASONS, WHY, Scores
from tsqlora.errors import DataError
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.record import RunRecord, question_in_words
from tsqlora.rows.chat import PREFERENCE, Format
from tsqlora.rows.labels import UNSEEN, are_numbers
from tsqlora.rows.readers import Hints
from tsqlora.rows.rows import Columns, row_hash, row_text
from tsqlora.rows.sources import is_local, open_table
from tsqlora.rows.splits import lacks_of
from tsqlora.rows.table import Table
from tsqlora.run_dir import CONFIG_FILE, SCORES_FILE, first_scores, is_run
from tsqlora.settings import load_config


def suspicion(scores: Scores) -> Float[np.ndarray, " n"]:
    """Return the calibrated loss above the median of the class, which orders labels by how likely they are wrong.

    A hard class is not suspected as a whole. docs/research.md compares this with other measures.
    """
    loss = scores.terms["loss"].astype(np.float64)
    groups = np.zeros(len(scores), dtype=np.int64) if scores.strata is None else scores.strata
    for group in np.unique(groups):
        loss[groups == group] -= np.median(loss[groups == group])
    return loss


def lists_of(scores: Scores, n: int) -> dict[str, Int[np.ndarray, " n"]]:
    """Return the first n rows of highest and lowest quality, and, where the loss is known, the most suspicious ones.

    Where Q ends, at -3, many rows tie, and the most suspicious of these lead.
    """
    doubt = suspicion(scores) if "loss" in scores.terms else None
    lists = {
        "highest": np.argsort(-scores.quality, kind="stable")[:n],
        "lowest": np.lexsort((scores.row_ids if doubt is None else -doubt, scores.quality))[:n],
    }
    return lists if doubt is None else {**lists, "suspicious": np.argsort(-doubt, kind="stable")[:n]}


def likely_wrong(scores: Scores) -> Bool[np.ndarray, " n"]:
    """Return the rows that the model predicts as another class with confidence; of preference pairs the swapped ones.

    With confidence: with at least the mean probability that it gives to labels of that class (Northcutt et al., 2021,
    confident learning).
    """
    if not scores.stratified:
        return scores.left_out_as("swapped pair")
    predicted, p = scores.predictions["predicted"], scores.predictions["predicted_probability"]
    own, labels = scores.predictions["label_probability"], scores.labels
    usual = {c: own[labels == c].mean() if (labels == c).any() else np.inf for c in np.unique(predicted)}
    return (predicted != labels) & (p >= np.array([usual[c] for c in predicted]))


def p_wrong(scores: Scores) -> Float[np.ndarray, " n"] | None:
    """Return the probability that each label is wrong, 0 without evidence; None where it was not estimated."""
    if scores.record.noise is None:
        return None
    return scores.predictions.get("wrong_probability", np.zeros(len(scores)))


def evident(scores: Scores) -> bool:
    """Whether there is evidence of wrong labels."""
    return bool((scores.record.noise or {}).get("evident"))


def explain(scores: Scores, n: int, *, data: Path | None = None) -> dict[str, Any]:
    """Return the n rows of highest and lowest quality, the most suspicious, and likely wrong labels, as plain JSON.

    Texts are found by hash in `data`, by default the file that the scores name.
    Raises DataError for scores without predictions or rows, and for a file that lacks a row.
    """
    if "loss" not in scores.terms or (scores.stratified and not scores.predictions):
        raise DataError("these scores have no predictions; score again")
    by_suspicion = np.argsort(-suspicion(scores), kind="stable")
    wrong = by_suspicion[likely_wrong(scores)[by_suspicion]]
    lists = {**lists_of(scores, n), "likely_wrong": wrong[:n]}
    rows = np.unique(np.concatenate(list(lists.values()))).tolist()
    texts, why = texts_or_why(scores, rows, data, remote=True)
    if why is not None:
        raise DataError(f"{why}; name the file of the rows: --data FILE")
    samples = {name: [_sample(scores, int(j), texts[int(j)]) for j in rows] for name, rows in lists.items()}
    left_out = int((~(scores.kept | scores.left_out_as("held out"))[wrong]).sum())
    counts = {"likely_wrong_rows": len(wrong), "likely_wrong_left_out": left_out}
    return {**samples, **counts, "kind": _kind(scores), "even": scores.even, "evident": evident(scores)}


def _kind(scores: Scores) -> str:
    """Return what the rows are to learn: "class", "text", "pair" (of texts), or "other"."""
    if scores.record.format is not None:
        return "pair" if scores.record.format == PREFERENCE else "text"
    return "class" if scores.stratified else "other"


def place_of(scores: Scores, row: int, data: Path | None = None) -> int:
    """Return the position in the scores of the row with this id.

    Raises DataError where it was not scored, and says why by its file.
    """
    places = np.flatnonzero(scores.row_ids == row)
    if len(places) == 0:
        raise DataError(f"row {row} has no score: {_why_unscored(scores, row, data or scores.record.data)}")
    return int(places[0])


def _why_unscored(scores: Scores, row: int, source: str | Path | None) -> str:
    record, ids = scores.record, scores.row_ids
    if source is None or record.columns is None or not is_local(source):
        what = f"those with one are numbered {ids.min()} to {ids.max()}"
        return f"{what}; others are empty or held out for validation; --data FILE says which"
    table = table_of(scores, source)
    if row >= len(table):
        return f"{table.name} has {len(table):,} rows, numbered 0 to {len(table) - 1}"
    columns, texts = Columns(**record.columns), record.format not in (None, "tokens")
    lacks = lacks_of(columns, Format(str(record.format), columns) if texts else None, tags=record.format == "tokens")
    (own,) = replace(table, ids=table.ids[[row]])
    if (reason := lacks(own)) is not None:
        return f"it has {reason} ({own.place}), and was left out"
    others = ", or left out since it cannot be rendered or its answer does not fit: run.json's notes say how many are"
    return f"it was held out for validation{others if texts else ''}"


def explain_row(scores: Scores, row: int, *, data: Path | None = None) -> dict[str, Any]:
    """Return what the scores know about the row with this id, and why it is kept or dropped, as plain JSON.

    The text is None where the file lacks it, and `no_text` says why. Raises DataError for a row that was not scored,
    and if `data` is given and lacks the text.
    """
    j = place_of(scores, row, data)
    probability = p_wrong(scores) if evident(scores) else None
    texts, why = texts_or_why(scores, [j], data)
    if data is not None and why is not None:
        raise DataError(f"no text of row {row}: {why}; give --data the file of the scored rows")
    return {
        **_sample(scores, j, texts.get(j)),
        "kind": _kind(scores),
        "no_text": why,
        "judged": scores.record.noise is not None,
        "wrong_probability": None if probability is None or np.isnan(probability[j]) else float(probability[j]),
        "out_of_sample": scores.record.out_of_sample,
    }


def table_of(scores: Scores, source: str | Path) -> Table:
    """Read rows as those that were scored."""
    table = open_table(source, split="train", hints=Hints(**scores.record.hints))
    return table.numbered() if scores.record.format is None and are_numbers(scores.record.classes) else table


def texts_or_why(
    scores: Scores, rows: Iterable[int], data: Path | None = None, *, remote: bool = False
) -> tuple[dict[int, str], str | None]:
    """Return the texts of these rows by position, and why some are missing.  Reads a hub data set only if `remote`.

    Pairs and messages are on separate lines, targets after →.
    """
    source, names, record = data or scores.record.data, scores.hashes, scores.record
    if names is None or source is None or record.columns is None:
        return {}, "the scores do not name their rows"
    if not remote and not is_local(source):
        return {}, f"{source} is not on this machine"
    columns, hashes = Columns(**record.columns), {int(j): names[j] for j in rows}
    target = columns.label if record.format is not None else None
    pair = columns.text_pair if record.format == PREFERENCE else None
    shown = columns if pair is None else replace(columns, text_pair=None)
    required, texts = set(hashes.values()), dict[str, str]()
    try:
        for cells in (row.cells for row in table_of(scores, source).using(columns)):
            if (name := row_hash(cells, columns)) in required:
                texts[name] = row_text(cells, shown)
                for arrow, column in (("→", target), ("rejected →", pair)):
                    if column is not None:
                        texts[name] += f"\n{arrow} {row_text(cells, Columns(column, None, None))}"
    except (DataError, OSError, UnicodeError) as error:
        return {}, f"{source} cannot be read ({error})"
    by_row = {j: texts[name] for j, name in hashes.items() if name in texts}
    missing = len(hashes) - len(by_row)
    return by_row, f"{source} has changed and lacks {missing} of these rows" if missing else None


def named(scores: Scores, value: Any) -> Any:
    """Return the name of a class (None if unseen), the names of several labels, or the number where there are none."""
    names = scores.record.classes
    if np.ndim(value):
        return [k if names is None else names[k] for k in np.flatnonzero(value > 0.5).tolist()]
    return value.item() if names is None else None if value == UNSEEN else names[int(value)]


def _sample(scores: Scores, j: int, text: str | None) -> dict[str, Any]:
    predicted = scores.predictions.get("predicted")
    probabilities = ("predicted_probability", "label_probability")
    return {
        "id": int(scores.row_ids[j]),
        "text": text,
        "label": named(scores, scores.labels[j]),
        **({} if predicted is None else {"predicted": named(scores, predicted[j])}),
        **_finite({name: scores.predictions[name] for name in probabilities if name in scores.predictions}, j),
        "quality": float(scores.quality[j]),
        "reason": (reason := REASONS[int(scores.reason_codes[j])]),
        "why": WHY[reason],
        "terms": _finite(scores.terms, j),
    }


def _finite(columns: Mapping[str, np.ndarray], j: int) -> dict[str, float]:
    """Return the values of a row, without those that are null."""
    return {name: float(values[j]) for name, values in columns.items() if not np.isnan(values[j])}


def explain_source(source: Path, row: int, *, data: Path | None = None) -> dict[str, Any]:
    """Return the scores of a row, by its number in its file; for a run also the number of epochs that drew it.

    Raises DataError if there are no scores, or none of this row.
    """
    scores = scores_of(source)
    explained = explain_row(scores, row, data=data)
    if not (source.is_dir() and is_run(source)):
        return explained
    record, place = RunRecord.load(source), place_of(scores, row)
    if explained["reason"] in ("trusted row", "held out"):
        explained["question"] = question_in_words(record.quality.get("question") or {})
    if "looks" not in record.quality:  # of a version without looks
        return explained
    draws = draws_of(source, record, scores)
    return {**explained, "drawn": sum(bool((rows == place).any()) for rows in draws), "epochs": len(draws)}


def scores_of(source: Path) -> Scores:
    """Read the scores of a run or of a file."""
    path = source / SCORES_FILE if source.is_dir() else source
    if not path.exists() and source.is_dir():
        folder = quote(str(source))
        raise DataError(f"{source} has no {SCORES_FILE}; type `tsqlora score {folder} --out {folder}/{SCORES_FILE}`")
    return Scores.load(path)


def draws_of(run: Path, record: RunRecord, scores: Scores) -> list[np.ndarray]:
    """Return the rows in each epoch of a run, trusted ones behind the pool's; `scores` are its last ones."""
    config, quality = load_config(run / CONFIG_FILE, trained=True), record.quality
    twins, question = scores.left_out_as("trusted row"), quality.get("question") or {}
    plan = EpochPlan(
        len(scores),
        config.quality.fraction,
        config.training.seed,
        trusted=quality["trusted_rows"],
        excluded=twins if twins.any() else None,
        contradicted=question.get("contradicted", False),
        awaits_scores=True,
    ).holding_out(scores)
    if "from" in question:
        epoch, place = question["from"]
        plan = replace(plan, asks=epoch * plan.size + place)
    plans, first = {0: plan}, first_scores(run / SCORES_FILE)
    for one in ([Scores.load(first)] if first.exists() else []) + [scores]:
        epoch = one.record.epoch or 0
        plans[epoch] = plan if one.record.not_ready else plan.scored(one, epoch)
    return [plans[max(e for e in plans if e <= epoch)].draw(epoch) for epoch in range(record.plan["epochs"])]
