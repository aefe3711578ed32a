"""Texts out of rows: what a cell must hold, and what is said where it does not."""

import reprlib
from collections.abc import Mapping
from typing import Any

from tsqlora.data.rows import Rows
from tsqlora.errors import DataError


def text_at(rows: Rows, i: int, column: str) -> str:
    """The text of row i in a column.  Raises DataError with file and row where there is none."""
    value = rows.rows[i].get(column)
    if is_blank(value):
        raise DataError(f"{rows.place(i)}: no text in column '{column}'; fill it in or leave the row out")
    return as_text(value, f"column '{column}'", rows.place(i))


def text_or_nothing(rows: Rows, i: int, column: str | None) -> str:
    """The same, and "" where the cell or the column is not there."""
    value = None if column is None else rows.rows[i].get(column)
    return "" if is_blank(value) else as_text(value, f"column '{column}'", rows.place(i))


def as_text(value: Any, where: str, place: str) -> str:
    """The value, which must be text that can be encoded; errors say where it stands."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{place}: {kind} {reprlib.repr(value)} in {where} is no text; write a string")
    if not _is_unicode(value):
        raise DataError(f"{place}: {where} has half a surrogate pair (\\ud800..\\udfff); remove it")
    return value


def row_text(row: Mapping[str, Any], columns: Mapping[str, str | None]) -> str:
    """What a row says in its columns `text` and `text_pair`, a line each; of a chat, a line a message.

    >>> row_text({"q": "Why?", "chat": [{"role": "user", "content": "Hi."}]}, {"text": "q", "text_pair": "chat"})
    'Why?\\nuser: Hi.'
    """
    cells = (row.get(column) for column in (columns["text"], columns["text_pair"]) if column is not None)
    return "\n".join(_cell_text(cell) for cell in cells if cell is not None)


def _cell_text(cell: Any) -> str:
    if isinstance(cell, list):
        return "\n".join(": ".join(map(str, item.values())) if isinstance(item, dict) else str(item) for item in cell)
    return str(cell)


def is_blank(value: Any) -> bool:
    """Nothing, or white space only."""
    return value is None or (isinstance(value, str) and not value.strip())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
