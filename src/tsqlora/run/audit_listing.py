"""The rows of an audit that a reader looks at: suspects, others to check, near-duplicates, and spellings."""

from dataclasses import dataclass, replace

import numpy as np

from tsqlora.data.labels import class_finder, join_labels, labels_at, plain_label, split_labels
from tsqlora.data.rows import row_text
from tsqlora.data.table import Table
from tsqlora.quality.suspects import Audit
from tsqlora.seeds import stream

LEAST = 100
"""Least rows in the list: without evidence, the first rows show a reader whether more are worth the time."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One row to review. `candidates` are labels, the likeliest first.

    `kind` is "suspect", "check", "near-duplicate" or "spelling". Without evidence of wrong labels no row has a
    probability. Where rows have several labels, a label here is the whole set, joined by "|".
    """

    row: int
    text: str
    label: str | int
    suggested_label: str | int
    wrong_probability: float | None
    kind: str
    candidates: tuple[str | int, ...]
    token: int | None = None
    """The number of the tag's token in the row, from 0; None for rows with other labels."""
    word: str = ""
    """That token; it begins at code point `start` of the text."""
    start: int = 0
    near: int | None = None
    """The nearest row that says nearly the same and has another label."""


def make_listing(audit: Audit, table: Table, *, review: int, seed: int) -> tuple[Listed, ...]:
    """List the likely wrong rows, at least LEAST, the likeliest first; and behind them, each row once:

    `review` others as checks, all near-duplicates with different labels, pair by pair, and other spellings of classes.
    """
    # Of a row with several labels, the one that is likeliest wrong; of a sentence, every token.
    order = np.sort(np.unique(audit.ids, return_index=True)[1]) if audit.tokens is None else np.arange(len(audit))
    suspects = min(max(int((order < audit.likely_wrong).sum()), LEAST), len(order))
    checks = suspects + draw_checks(audit.labels[order[suspects:]], review, stream("audit review", seed))
    tokens: list[int | None] = [None] * len(audit) if audit.tokens is None else audit.tokens.tolist()
    keys = list(zip(audit.ids.tolist(), tokens, strict=True))
    place_of = {key: j for j, key in reversed([*enumerate(keys)])}
    near, written = dict[int, int](), _written(table)
    for pair in audit.duplicates:
        near.setdefault(pair.first, pair.second)
        near.setdefault(pair.second, pair.first)
    kinds = {keys[j]: "suspect" for j in order[:suspects]} | {keys[j]: "check" for j in order[checks]}
    for key in ((row, None) for pair in audit.duplicates for row in (pair.first, pair.second)):
        kinds.setdefault(key, "near-duplicate")
    kinds |= {key: "spelling" for key in written if key not in kinds and key in place_of}
    shown = replace(table, ids=np.array(sorted({row for row, _ in kinds} | near.keys()), dtype=np.int64))
    rows, find, columns = {row.id: row.cells for row in shown}, class_finder(audit.classes), table.columns
    several = table.classes is not None and table.classes.kind.joint

    def labels(row: int) -> list[str]:
        return [str(find(plain_label(one))) for one in split_labels(rows[row][columns.label or ""])]

    def label(j: int, c: int) -> str | int:
        """The label of place j, of several all, if its class were c."""
        if not several:
            return audit.classes[c]
        own, other = str(audit.classes[audit.labels[j]]), str(audit.classes[c])
        return join_labels(list(dict.fromkeys(other if one == own else one for one in labels(keys[j][0]))))

    def listed(key: tuple[int, int | None], kind: str) -> Listed:
        row, token = key
        if (j := place_of.get(key)) is None:  # an empty set of labels, which nothing judges
            one = Listed(row, row_text(rows[row], columns), "", "", None, kind, ())
        else:
            own = int(audit.labels[j])
            others = set(labels(row)) - {str(audit.classes[own])} if several else set[str]()
            words = [] if token is None else list(map(str, rows[row][columns.text]))
            one = Listed(
                row=row,
                text=row_text(rows[row], columns),
                label=label(j, own),
                suggested_label=label(j, int(audit.suggested[j])),
                wrong_probability=float(audit.probability[j]) if audit.evident else None,
                kind=kind,
                candidates=tuple(
                    label(j, c) for c in audit.candidates[j].tolist() if str(audit.classes[c]) not in others
                ),
                token=token,
                word="" if token is None else words[token],
                start=0 if not token else len(" ".join(words[:token])) + 1,
            )
        if kind == "spelling":
            return replace(one, label=written[key], suggested_label=one.label, wrong_probability=None)
        if kind == "near-duplicate" and (twin := place_of.get((near[row], None))) is not None:
            one = replace(one, suggested_label=label(twin, int(audit.labels[twin])))
        return replace(one, near=near.get(row))

    return tuple(listed(key, kind) for key, kind in kinds.items())


def _written(table: Table) -> dict[tuple[int, int | None], str | int]:
    """The labels, by row and token, that the table writes in another spelling than their class."""
    written, classes = dict[tuple[int, int | None], str | int](), table.classes
    if classes is None or not classes.spellings:
        return written
    for row in table:
        labels = labels_at(row, table.columns.label or "", classes.kind)
        if classes.kind.by_token:
            written |= {(row.id, j): label for j, label in enumerate(labels) if label in classes.spellings}
        elif any(label in classes.spellings for label in labels):
            written[row.id, None] = join_labels(labels) if classes.kind.joint else labels[0]
    return written


def draw_checks(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` places at random, as evenly over the classes as these allow, in random order."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # the rank of each row within its class
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return chosen[rng.permutation(len(chosen))]
