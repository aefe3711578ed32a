"""Sequences that a trainer made of rows: their tokens and label values, unpacked and without padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.errors import DataError
from tsqlora.libs.shapes import Int
from tsqlora.rows.batches import IGNORED, sides_of
from tsqlora.rows.datasets import Dataset

IDS = ("input_ids", "prompt_ids")
"""Columns by which a set is known as prepared."""
SIDES = ("chosen", "rejected")
Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Trained:
    """One sequence as a model will read it; `targets` are label values, IGNORED where a token has no loss.

    A label stands at the token that is predicted, as in transformers. It may differ from the token: LLaMA-Factory's
    `efficient_eos` puts the end token on the first place of the next turn.
    """

    ids: Int[np.ndarray, " t"]
    targets: Int[np.ndarray, " t"]
    row: int
    """The row of the prepared set; a packed row has several sequences."""
    side: str = ""
    """"chosen" or "rejected" of a pair."""
    places: tuple[tuple[int, int, int], ...] | None = None
    """Message, start and end of each piece, where we prepared it; an end beyond the tokens is cut."""

    @property
    def trained(self) -> np.ndarray:
        """The places that have a loss."""
        return np.flatnonzero(self.targets != IGNORED)


def is_packed(sequences: Sequence[Trained]) -> bool:
    """Whether a row of the set holds several sequences that are not the two sides of a pair."""
    return len({(one.row, one.side) for one in sequences}) < len(sequences)


def sequences_of(rows: Dataset, collate: Collate | None = None) -> Iterator[Trained]:
    """Yield the sequences of a prepared set, in order.

    Labels are the set's own. Where it has none, `collate` makes them, row by row, as the trainer will; without it,
    tokens in its `completion_mask` and `assistant_masks` are trained, or all where it has neither.

    Raises DataError naming the row for a set without token ids, and for columns that do not fit each other.
    """
    for number in range(len(rows)):
        row = rows[number]
        if "second" in row:
            for side, one in zip(SIDES, sides_of(row), strict=True):
                yield Trained(np.asarray(one["input_ids"], np.int64), np.asarray(one["labels"], np.int64), number, side)
            continue
        if "prompt_ids" not in row and "input_ids" not in row:
            raise DataError(f"row {number} has no input_ids; this set is not prepared, give --data for rows of texts")
        made = _pair if "prompt_ids" in row else _sequences
        try:
            yield from list(made(row, number, collate))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise DataError(
                f"row {number} of the prepared set is damaged ({type(error).__name__}: {error}); prepare it again"
            ) from error


def _sequences(row: Mapping[str, Any], number: int, collate: Collate | None) -> Iterator[Trained]:
    ids = np.asarray(row["input_ids"], np.int64).reshape(-1)
    labels = _labels(row, ids, collate)
    if len(labels) != len(ids):
        raise ValueError(f"{len(labels)} labels for {len(ids)} tokens")
    for part in _segments(row, len(ids)):
        targets = labels[part].copy()
        targets[:1] = IGNORED  # nothing predicts the first token
        yield Trained(ids[part], targets, number)


def _pair(row: Mapping[str, Any], number: int, collate: Collate | None) -> Iterator[Trained]:
    """The two sequences of a preference row of TRL's DPOTrainer: the answer's tokens are trained.

    Its collator cuts them.
    """
    batch = {} if collate is None else collate([row])
    for k, side in enumerate(SIDES):
        if "completion_mask" in batch:
            read = np.asarray(batch["attention_mask"][k]) > 0
            ids = np.asarray(batch["input_ids"][k], np.int64)[read]
            answered = np.asarray(batch["completion_mask"][k])[read] > 0
        else:
            parts = [np.asarray(row[name], np.int64) for name in ("prompt_ids", f"{side}_ids")]
            ids, answered = np.concatenate(parts), np.repeat([False, True], [len(part) for part in parts])
        yield Trained(ids, np.where(answered, ids, IGNORED), number, side)


def _labels(row: Mapping[str, Any], ids: np.ndarray, collate: Collate | None) -> np.ndarray:
    if collate is not None:
        batch = collate([{name: value for name, value in row.items() if value is not None}])
        labels = np.asarray(batch["labels"], np.int64).reshape(-1)
        made = np.asarray(batch["input_ids"], np.int64).reshape(-1)
        first = 0 if np.array_equal(made[: len(ids)], ids[: len(made)]) else len(made) - len(ids)  # padded on the left
        cut = labels[max(first, 0) : max(first, 0) + len(ids)]
        return np.r_[cut, np.full(len(ids) - len(cut), IGNORED)]
    if row.get("labels") is not None:
        return np.asarray(row["labels"], np.int64).reshape(-1)
    labels = ids.copy()
    for mask in ("completion_mask", "assistant_masks", "assistant_mask"):
        if row.get(mask) is not None:
            labels[np.asarray(row[mask]).reshape(-1) == 0] = IGNORED
    return labels


def _segments(row: Mapping[str, Any], length: int) -> Iterator[slice]:
    """The sequences that share a row, without the padding at either end.

    Packed rows say their boundaries by the lengths of sequences, by position ids that start again, or by an attention
    mask that numbers the sequences.
    """
    mask = np.ones(length, np.int64) if row.get("attention_mask") is None else np.asarray(row["attention_mask"])
    mask = mask.reshape(-1)
    read = np.flatnonzero(mask)
    if not len(read):
        return
    first, last = int(read[0]), int(read[-1]) + 1
    if row.get("seq_lengths") is not None:
        ends = np.cumsum(np.asarray(row["seq_lengths"], np.int64))
        starts = np.r_[0, ends[:-1]]
    else:
        new = np.zeros(length, bool)
        new[first] = True
        if row.get("position_ids") is not None:
            positions = np.asarray(row["position_ids"]).reshape(-1)
            new[1:] |= positions[1:] <= positions[:-1]
        new[1:] |= mask[1:] != mask[:-1]
        starts = np.flatnonzero(new[:last])
        starts = starts[starts >= first]
        ends = np.r_[starts[1:], last]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if start < min(end, last):
            yield slice(start, min(end, last))
