"""What is seen of texts before they are trained on: the worst findings, and which answers do not fit."""

from collections.abc import Mapping
from dataclasses import replace
from shlex import quote
from typing import Any

import numpy as np
from torch import nn

from tsqlora.auditing.scores import Scores, from_terms
from tsqlora.auditing.texts.answers import turns_in
from tsqlora.auditing.texts.faults import SHARE
from tsqlora.auditing.texts.findings import ERROR, NOTE, findings_of
from tsqlora.auditing.texts.ledger import line_of
from tsqlora.auditing.texts.look import CUT, FOREIGN, SAMPLE, SWAPPED, AnswerLook, look_at_answers
from tsqlora.auditing.texts.prepared import Collate, is_packed, sequences_of
from tsqlora.auditing.texts.raw import audited
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.errors import DataError
from tsqlora.model.request import Compute, RowNames
from tsqlora.rows.chat import Chat
from tsqlora.rows.table import Table

ROWS = 500
"""Rows to look at, evenly spaced."""
SHOWN = 3
UNFIT, OTHER = {FOREIGN: "foreign answer", CUT: "cut answer", SWAPPED: "swapped pair"}, "unfit answer"
"""Reasons for which rows are left out, by fault."""
PACKED = "rows are packed: one with a wrong answer is left out whole; packing=False leaves out that answer alone"
OF_ANSWERS = {*UNFIT.values(), OTHER}


def worst_findings(
    samples: Any,
    vocabulary: Vocabulary,
    *,
    table: Table | None = None,
    max_length: int = 0,
    most: float = 0.0,
    collate: Collate | None = None,
) -> list[str]:
    """Say the worst errors and warnings of prepared samples; of a `table` those of its rows, cut at `max_length`.

    Raises DataError for an error in all rows of a table, unless `most`, the share of rows that may be bad, is 1.
    """
    places = np.unique(np.linspace(0, len(samples) - 1, ROWS).astype(int)).tolist()
    if table is not None and table.format is not None:
        rows = list(replace(table, ids=np.sort(table.samples.ids[places])))
        lines = audited(rows, table.format, vocabulary, max_length)
    else:
        sequences = [replace(one, row=j) for j in places for one in sequences_of([samples[j]], collate)]
        lines = [line_of(Chat((), row=one.row), [one], vocabulary) for one in sequences]
    worst = findings_of(lines)
    worst = [finding for finding in worst if finding.severity != NOTE][:SHOWN]
    see, shown = "tsqlora.audit(trainer)", list[str]()
    if table is not None:
        see = f"`tsqlora audit {quote(table.name)} --model {quote(vocabulary.tokenizer.name_or_path)}`"
    for finding in worst:
        few = ", ".join(map(str, finding.where[:3])) + (", …" if len(finding.where) > 3 else "")
        of = "all" if len(lines) == len(samples) else f"the {len(lines):,} sampled"
        severity = "error " if finding.severity == ERROR else ""  # the rest are shown as warnings, which says it
        where = f"{len(finding.where) / len(lines):.0%} of {of} rows: {few}"
        shown.append(f"{severity}{finding.name}: {finding.cause} ({where}); see {see}")
        if table is not None and finding.severity == ERROR and len(finding.where) == len(lines) and most < 1:
            cure = f"; with TRL {finding.cure['TRL']}" if finding.cure else ""
            raise DataError(
                f"{finding.name} in {of} rows of {table.name}: {finding.cause}{cure}; {see} shows them, and "
                "data.max_bad_rows 1 trains on them as they are"
            )
    return shown


def look_before(
    model: nn.Module,
    samples: Any,
    vocabulary: Vocabulary,
    compute: Compute,
    *,
    collate: Collate | None = None,
    seed: int = 0,
) -> AnswerLook:
    """Look at the answers of SAMPLE prepared samples, and of all where a fault is evident among these."""
    order, look = np.random.default_rng([seed, 45]).permutation(len(samples)), AnswerLook([])
    for some in (order[:SAMPLE], order):
        places = np.sort(some).tolist()
        sequences = [replace(one, row=j) for j in places for one in sequences_of([samples[j]], collate)]
        look = look_at_answers(model, turns_in(sequences, vocabulary), vocabulary, compute, seed=seed)
        look.notes += [PACKED] if is_packed(sequences) else []
        if len(places) == len(samples) or not look.lists:
            break
    return look


def even_scores(samples: Any, collate: Collate | None, rows: RowNames, answers: AnswerLook, *, seed: int) -> Scores:
    """Draw evenly from all rows whose answers fit."""
    trained = np.zeros(len(samples), np.int64)
    for one in sequences_of(samples, collate):
        trained[one.row] += len(one.trained)
    scores = from_terms(
        {},
        labels=trained,
        stratified=False,
        weights={},
        temperature=1.0,
        even=True,
        record={"seed": seed, "step": 0, "epoch": 0, "look": 1, **rows.about},
        hashes=rows.hashes,
        ids=rows.ids,
    )
    return without_unfit(scores, answers)


def in_one_line(look: AnswerLook, dropped: Mapping[str, int], rows: int) -> str:
    """Say how many of the rows are left out and why, and what the look can find.

    >>> in_one_line(AnswerLook([]), {"foreign answer": 12, "duplicate": 1}, 240)
    "of 240 rows these are left out: 12 as 'foreign answer'"
    """
    why = ", ".join(f"{count} as '{reason}'" for reason, count in dropped.items() if reason in OF_ANSWERS)
    unseen = ", ".join(name for name, one in look.detections.items() if not one.usable)
    finds = ", ".join(f"{one.recall:.0%} of {name}" for name, one in look.detections.items() if one.usable)
    parts = [
        f"this model cannot tell which rows have {unseen}" if unseen else "",
        f"of {rows:,} rows these are left out: {why}" if why else f"no row of {rows:,} is left out for its answer",
        f"with {SHARE:.0%} of the rows faulty, the look would find {finds}" if finds else "",
    ]
    return "; ".join(filter(None, parts))


def without_unfit(scores: Scores, look: AnswerLook) -> Scores:
    """Return the scores without the rows that a look calls wrong, at most half of all, the likeliest first."""
    unfit = [(p, row, fault) for fault in look.detections for row, p in look.rows(fault).items()]
    chosen = sorted(unfit, key=lambda one: (-one[0], one[1]))
    chosen = chosen[: max(0, len(scores) // 2 - int((~scores.kept).sum()))]
    p_wrong = np.zeros(len(scores))
    for p, row, _ in chosen:
        p_wrong[row] = max(p_wrong[row], p)
    for fault in dict.fromkeys(fault for *_, fault in chosen):
        mask = np.zeros(len(scores), np.bool_)
        mask[[row for _, row, other in chosen if other == fault]] = True
        scores = scores.drop(mask, UNFIT.get(fault, OTHER))
    predictions = {**scores.predictions, "wrong_probability": p_wrong} if chosen else scores.predictions
    return replace(scores, predictions=predictions).noted(answers=look.summary())
