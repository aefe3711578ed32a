"""Reconcile a set that a trainer has prepared with the rows that it was made of."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsqlora.data.formats import Format, format_of
from tsqlora.data.readers import SNIFF, Hints
from tsqlora.data.sources import open_table
from tsqlora.errors import DataError, SettingsError
from tsqlora.progress import Progress
from tsqlora.text.conversations import Conversation, conversation
from tsqlora.text.ledger import Line, line_of
from tsqlora.text.matching import match, unwrapped
from tsqlora.text.prepared import Collate, Trained, is_packed, sequences_of
from tsqlora.text.vocabulary import Vocabulary

PREPARED = {"input_ids", "labels", "attention_mask", "position_ids", "text"}
"""Columns of a prepared set that are no source."""
MOST_UNMATCHED = 0.01
MOST_ALIKE = 0.9


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Source rows, their lines, and their sequences; and how many sequences have no row."""

    rows: list[Conversation]
    lines: list[Line]
    sequences: dict[int, list[Trained]]
    unmatched: int
    longest: int
    lengths: list[int]
    """Tokens of each row of the set, of which a batch is made; none of packed rows."""

    def of(self, places: Collection[int]) -> dict[int, tuple[Trained, ...]]:
        """The sequences of some rows."""
        return {place: tuple(self.sequences.get(place, ())) for place in places}


def audit_sequences(
    made: Any,
    collate: Collate | None,
    vocabulary: Vocabulary,
    *,
    data: Any = None,
    progress: Progress | None = None,
) -> Reconciled:
    """Reconcile a prepared set with source rows: a file, rows, or the set's own columns.

    Where more than MOST_UNMATCHED of the sequences have no row, no row is called dropped.
    """
    sequences = list[Trained]()
    for number, one in enumerate(sequences_of(made, collate)):
        sequences.append(one)
        if progress is not None and number % 1000 == 0:
            progress("ledger", one.row, len(made))
    names, unmatched = list(getattr(made, "column_names", None) or made[0]), 0
    packed = is_packed(sequences)
    if data is not None:
        rows = conversations_of(data)
        assert rows is not None
        if _may_be_wrapped(names, sequences):
            parts = unwrapped(rows, sequences, vocabulary)
            sequences = parts if len(parts) > len(rows) / 2 else sequences  # rows cut to one length are hardly whole
        by_row, sure, left = match(rows, sequences, vocabulary)
        unmatched = len(left)
    elif not packed and (format := _own_format(names)) is not None:
        rows = [_without_end(conversation(made[j], format, j), vocabulary) for j in range(len(made))]
        by_row, sure = _by_row(sequences), {}
    else:
        by_row = {j: [one] for j, one in enumerate(sequences)} if packed else _by_row(sequences)
        rows, sure = [Conversation(j, ()) for j in range(len(by_row) if packed else len(made))], {}
    longest = max((len(one.ids) for one in sequences), default=0)
    lines = [line_of(row, by_row.get(row.row, ()), vocabulary, limit=longest) for row in rows]
    unsure = unmatched > MOST_UNMATCHED * len(sequences)
    for line in lines:
        line.match = sure.get(line.row, line.match)
        if unsure and line.match == "unmatched":
            line.fate = "unknown"
    lengths = [] if packed else [len(one.ids) for one in sequences]
    return Reconciled(rows, lines, by_row, unmatched, longest, lengths)


def _may_be_wrapped(names: Collection[str], sequences: Sequence[Trained]) -> bool:
    """Whether rows may have been joined and cut into equal parts, with no word of where one ends.

    Rows that were cut to one length begin alike; parts of a stream begin anywhere.
    """
    lengths = {len(one.ids) for one in sequences[:-1]}
    paired = any(one.side for one in sequences)
    if paired or len(lengths) != 1 or len(sequences) < 3 or {"seq_lengths", "position_ids"} & {*names}:
        return False
    ((_, alike),) = Counter(tuple(one.ids[:2].tolist()) for one in sequences).most_common(1)
    return alike < MOST_ALIKE * len(sequences)


def _by_row(sequences: Iterable[Trained]) -> dict[int, list[Trained]]:
    by_row = dict[int, list[Trained]]()
    for one in sequences:
        by_row.setdefault(one.row, []).append(one)
    return by_row


def _without_end(row: Conversation, vocabulary: Vocabulary) -> Conversation:
    """The row without the end token that TRL writes behind its completion."""
    end = vocabulary.tokenizer.eos_token
    if not isinstance(end, str) or not row.answer.endswith(end):
        return row
    answer = replace(row.messages[-1], content=row.answer.removesuffix(end))
    return replace(row, messages=(*row.messages[:-1], answer))


def _own_format(names: Sequence[str]) -> Format | None:
    try:
        return format_of([name for name in names if name not in PREPARED], "prepared")
    except (DataError, SettingsError):
        return None


def conversations_of(rows: Any, hints: Hints = SNIFF, like: Format | None = None) -> list[Conversation] | None:
    """Read a file, or a list of dicts or `datasets.Dataset`, as conversations; None for None.

    Rows with the columns of the format `like` have this format, others their own.
    """
    if rows is None:
        return None
    if isinstance(rows, str | Path):
        table = open_table(rows, hints=hints)
        names, name, cells = table.names, table.name, (row.cells for row in table)
    else:
        names, name, cells = list(rows[0]), "data", (rows[j] for j in range(len(rows)))
    own = like and replace(like, columns=like.columns.spelled(names))
    format = own if own and {own.columns.text, own.columns.label} <= {*names, None} else format_of(names, name)
    return [conversation(row, format, j) for j, row in enumerate(cells)]
