"""The rows of an audit that are worth a reader's time, with their texts."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tsqlora.data.cells import row_text
from tsqlora.data.splits import Splits
from tsqlora.quality.audit import Audit
from tsqlora.quality.label_noise import DOUBT
from tsqlora.seeds import stream

LEAST = 100
"""Rows that are listed at least: without evidence the first of the order, by which a reader sees whether it is worth
more."""
DUPLICATES = 100


@dataclass(frozen=True, slots=True)
class Listed:
    """One row to review. `candidates` are labels, the likeliest first; `kind` is "suspect" or "check"."""

    row: int
    text: str
    label: str | int
    suggested_label: str | int
    wrong_probability: float
    kind: str
    candidates: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Suspects, the likeliest wrong first, then rows to check; and pairs of near-duplicates that differ in label.

    Each of the two in a pair is a dict of row, text and label.
    """

    rows: tuple[Listed, ...]
    checks: int
    duplicates: tuple[tuple[dict[str, Any], dict[str, Any]], ...]


def make_listing(audit: Audit, splits: Splits, *, review: int, seed: int) -> Listing:
    """Rows whose label is wrong with a chance above DOUBT, at least LEAST; `review` others; the first DUPLICATES."""
    doubted = int((audit.probability > DOUBT).sum()) if audit.evident else 0
    suspects = min(max(doubted, LEAST), len(audit))
    checks = suspects + draw_checks(audit.labels[suspects:], review, stream("audit review", seed))
    pairs = audit.duplicates[:DUPLICATES]
    place_of = {int(row): j for j, row in enumerate(audit.ids)}
    places = [*range(suspects), *checks.tolist()]
    wanted = {int(audit.ids[j]) for j in places} | {row for pair in pairs for row in (pair.first, pair.second)}
    texts = texts_of(splits, wanted)
    rows = [_listed(audit, j, "suspect" if j < suspects else "check", texts) for j in places]

    def member(row: int) -> dict[str, Any]:
        return {"row": row, "text": texts[row], "label": audit.classes[audit.labels[place_of[row]]]}

    return Listing(tuple(rows), len(checks), tuple((member(pair.first), member(pair.second)) for pair in pairs))


def draw_checks(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of so many rows, drawn at random and as evenly from the classes as these allow, in random order."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # which of its class's rows each is
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return chosen[rng.permutation(len(chosen))]


def texts_of(splits: Splits, rows: set[int]) -> dict[int, str]:
    """The texts of rows by their ids; of a pair a line each."""
    columns, found = asdict(splits.columns), dict[int, str]()
    for part in splits.chunks("train"):
        found |= {int(j): row_text(row, columns) for j, row in zip(part.ids, part.rows, strict=True) if j in rows}
    return found


def _listed(audit: Audit, j: int, kind: str, texts: dict[int, str]) -> Listed:
    names = audit.classes
    return Listed(
        row=int(audit.ids[j]),
        text=texts[int(audit.ids[j])],
        label=names[audit.labels[j]],
        suggested_label=names[audit.suggested[j]],
        wrong_probability=float(audit.probability[j]),
        kind=kind,
        candidates=tuple(names[c] for c in audit.candidates[j]),
    )
