"""The rows of an audit that a reader looks at: likely wrong ones, others to check, and near-duplicates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tsqlora.data.labels import join_labels, split_labels
from tsqlora.data.rows import row_text
from tsqlora.data.table import Table
from tsqlora.quality.suspects import Audit
from tsqlora.seeds import stream

LEAST = 100
"""Least rows in the list: without evidence, the first rows show a reader whether more are worth the time."""
MOST_PAIRS = 100


@dataclass(frozen=True, slots=True)
class Listed:
    """One row to review. `candidates` are labels, the likeliest first; `kind` is "suspect" or "check".

    Without evidence of wrong labels no row has a probability.

    Where rows have several labels, a label here is the whole set, joined by "|".
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


@dataclass(frozen=True, slots=True)
class Listing:
    """Suspects, the likeliest wrong first, then rows to check; and pairs of near-duplicates with different labels.

    Each member of a pair is a dict of row, text and label.
    """

    rows: tuple[Listed, ...]
    checks: int
    duplicates: tuple[tuple[dict[str, Any], dict[str, Any]], ...]


def make_listing(audit: Audit, table: Table, *, review: int, seed: int) -> Listing:
    """List the likely wrong rows, at least LEAST; `review` others; and the first MOST_PAIRS near-duplicates."""
    # Of a row with several labels, the one that is likeliest wrong; of a sentence, every token.
    order = np.sort(np.unique(audit.ids, return_index=True)[1]) if audit.tokens is None else np.arange(len(audit))
    suspects = min(max(int((order < audit.likely_wrong).sum()), LEAST), len(order))
    checks = suspects + draw_checks(audit.labels[order[suspects:]], review, stream("audit review", seed))
    places = [*order[:suspects].tolist(), *order[checks].tolist()]
    pairs = audit.duplicates[:MOST_PAIRS]
    ids = {int(audit.ids[j]) for j in places} | {row for pair in pairs for row in (pair.first, pair.second)}
    shown = replace(table, ids=np.array(sorted(ids), dtype=np.int64))
    lister = _Lister(audit, table, {row.id: row.cells for row in shown})
    place_of = {int(row): j for j, row in enumerate(audit.ids)}

    def member(row: int) -> dict[str, Any]:
        j = place_of.get(row)
        label = "" if j is None else lister.label(j, int(audit.labels[j]))
        return {"row": row, "text": lister.text(row), "label": label}

    duplicates = tuple((member(pair.first), member(pair.second)) for pair in pairs)
    kinds = ["suspect"] * suspects + ["check"] * len(checks)
    return Listing(tuple(map(lister.listed, places, kinds)), len(checks), duplicates)


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
        return list(map(str, split_labels(self.rows[row][self.table.columns.label or ""])))


def draw_checks(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` places at random, as evenly over the classes as these allow, in random order."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # the rank of each row within its class
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return chosen[rng.permutation(len(chosen))]
