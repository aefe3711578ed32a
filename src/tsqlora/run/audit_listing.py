"""The rows of an audit that a reader looks at: suspects, others to check, near-duplicates, and spellings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    tokens = [None] * len(audit) if audit.tokens is None else audit.tokens.tolist()
    place_of = {(row, tokens[j]): j for j, row in reversed([*enumerate(audit.ids.tolist())])}
    near, written = dict[int, int](), _written(table)
    for pair in audit.duplicates:
        near.setdefault(pair.first, pair.second)
        near.setdefault(pair.second, pair.first)
    twins = [(row, None) for pair in audit.duplicates for row in (pair.first, pair.second)]
    kinds = {(int(audit.ids[j]), tokens[j]): "suspect" for j in order[:suspects]}
    kinds |= {(int(audit.ids[j]), tokens[j]): "check" for j in order[checks]}
    kinds |= {key: "near-duplicate" for key in twins if key not in kinds}
    kinds |= {key: "spelling" for key in written if key not in kinds and key in place_of}
    shown = replace(table, ids=np.array(sorted({row for row, _ in kinds} | near.keys()), dtype=np.int64))
    lister = _Lister(audit, table, {row.id: row.cells for row in shown})

    def listed(key: tuple[int, int | None], kind: str) -> Listed:
        if key not in place_of:  # an empty set of labels, which nothing judges
            one = Listed(key[0], lister.text(key[0]), "", "", None, kind, ())
        else:
            one = lister.listed(place_of[key], kind)
        if kind == "spelling":
            return replace(one, label=written[key], suggested_label=one.label, wrong_probability=None)
        if kind == "near-duplicate" and (twin := place_of.get((near[key[0]], None))) is not None:
            one = replace(one, suggested_label=lister.label(twin, int(audit.labels[twin])))
        return replace(one, near=near.get(key[0]))

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


@dataclass(frozen=True, slots=True)
class _Lister:
    """Shows places of an audit as a reader knows them: by the texts of `rows`, by number, and names of classes."""

    audit: Audit
    table: Table
    rows: Mapping[int, Mapping[str, Any]]

    def text(self, row: int) -> str:
        return row_text(self.rows[row], self.table.columns)

    def label(self, j: int, c: int) -> str | int:
        """The label of place j if its class were c."""
        names = self.audit.classes
        if not self._several:
            return names[c]
        own = str(names[self.audit.labels[j]])
        renamed = [str(names[c]) if name == own else name for name in self._labels(int(self.audit.ids[j]))]
        return join_labels(list(dict.fromkeys(renamed)))

    def listed(self, j: int, kind: str) -> Listed:
        audit, row, own = self.audit, int(self.audit.ids[j]), int(self.audit.labels[j])
        others = set(self._labels(row)) - {str(audit.classes[own])} if self._several else set[str]()
        token = None if audit.tokens is None else int(audit.tokens[j])
        words = [] if token is None else list(map(str, self.rows[row][self.table.columns.text]))
        return Listed(
            token=token,
            word="" if token is None else words[token],
            start=0 if not token else len(" ".join(words[:token])) + 1,
            row=row,
            text=self.text(row),
            label=self.label(j, own),
            suggested_label=self.label(j, int(audit.suggested[j])),
            wrong_probability=float(audit.probability[j]) if audit.evident else None,
            kind=kind,
            candidates=tuple(self.label(j, int(c)) for c in audit.candidates[j] if str(audit.classes[c]) not in others),
        )

    @property
    def _several(self) -> bool:
        return self.table.classes is not None and self.table.classes.kind.joint

    def _labels(self, row: int) -> list[str]:
        find = class_finder(self.audit.classes)
        labels = map(plain_label, split_labels(self.rows[row][self.table.columns.label or ""]))
        return [str(find(label)) for label in labels]


def draw_checks(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` places at random, as evenly over the classes as these allow, in random order."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # the rank of each row within its class
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return chosen[rng.permutation(len(chosen))]
