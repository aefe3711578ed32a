"""Rows and their cells: missing values, text, and the hash that identifies a row."""

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tsqlora.data.columns import Columns
from tsqlora.data.folders import content_hash
from tsqlora.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Args:
        cells: its values by column.
        source: the name of its table.
        number: its line or row there, from 1, or its file.
        id: its place in the table's file, from 0.
    """

    cells: dict[str, Any]
    source: str
    number: int | str
    id: int

    @property
    def place(self) -> str:
        """File and line, for errors: `train.jsonl:17`."""
        return f"{self.source}:{self.number}"


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, or white space."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


class MissingError(DataError):
    """A row without a required value; `what` names the value without the row's place."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(f"{place}: {what}; fill it in or remove the row")
        self.what = what


def lacking(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The first missing value of a row, in words; None if it has all. `columns` maps names to what they hold."""
    missing = next((column for column in columns if is_missing(row.get(column))), None)
    return None if missing is None else f"no {columns[missing]} in column '{missing}'"


def text_at(row: Row, column: str) -> str:
    """The text in a column.  Raises MissingError with file and row if it is empty."""
    value = row.cells.get(column)
    if is_missing(value):
        raise MissingError(row.place, f"no text in column '{column}'")
    return as_text(value, f"column '{column}'", row.place)


def tokens_at(row: Row, column: str) -> list[str]:
    """The tokens of a row.  Raises MissingError with file and row if there are none, DataError if they are no list."""
    value = row.cells.get(column)
    if is_missing(value) or value == []:
        raise MissingError(row.place, f"no tokens in column '{column}'")
    if not isinstance(value, list):
        raise DataError(
            f"{row.place}: column '{column}' holds {type(value).__name__} {reprlib.repr(value)}, not a list of "
            "tokens; write lists, in JSON lines or Parquet"
        )
    return [as_text(token, f"column '{column}'", row.place) for token in value]


def text_or_empty(row: Row, column: str | None) -> str:
    """The text in a column; "" if the cell is empty or the column is missing."""
    value = None if column is None else row.cells.get(column)
    return "" if is_missing(value) else as_text(value, f"column '{column}'", row.place)


def as_text(value: Any, where: str, place: str) -> str:
    """The value itself.  Raises DataError with its place if it is not text, or text that UTF-8 cannot encode."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{place}: {where} holds {kind} {reprlib.repr(value)}, not text; write a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: {where} holds half a surrogate pair (\\ud800..\\udfff); remove it") from None
    return value


def row_text(cells: Mapping[str, Any], columns: Columns) -> str:
    """The system prompt, text and second text of a row, a line each; of a chat, a line a message; tokens with spaces.

    >>> row_text({"q": "Why?", "chat": [{"role": "user", "content": "Hi."}]}, Columns("q", "chat", None))
    'Why?\\nuser: Hi.'
    """
    names = (columns.system, columns.text, columns.text_pair)
    used = (cells.get(name) for name in names if name is not None)
    return "\n".join(_cell_text(cell) for cell in used if cell is not None)


def _cell_text(cell: Any) -> str:
    if isinstance(cell, list) and all(isinstance(item, str) for item in cell):
        return " ".join(cell)
    if isinstance(cell, list):
        return "\n".join(": ".join(map(str, item.values())) if isinstance(item, dict) else str(item) for item in cell)
    return str(cell)


def sample_hash(text: str, pair: str, label: str) -> str:
    """First 16 hex digits of the SHA-256 of text, pair and label, joined by U+001F."""
    return hashlib.sha256(f"{text}\x1f{pair}\x1f{label}".encode()).hexdigest()[:16]


def row_hash(cells: Mapping[str, Any], columns: Columns) -> str:
    """`sample_hash` of a row's text, second text and label; a missing one counts as empty.

    The label counts as the row writes it: its class id would change with the other classes. Of a file its content
    counts.
    """
    values = [None if c is None else cells.get(c) for c in (columns.text, columns.text_pair, columns.label)]
    if columns.media:
        values[0] = content_hash(str(values[0]))
    # Lists (chats) as JSON with sorted keys: Parquet may change the order of keys.
    written = (
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
        if isinstance(value, list | dict)
        else ""
        if value is None
        else str(value)
        for value in values
    )
    return sample_hash(*written)
