"""Columns that a person would call part of a row, and that its format does not read."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple
from typing import Any

from tsqlora.data.cells import Row, is_missing
from tsqlora.data.columns import Columns
from tsqlora.errors import DataError

OF_CHATS = ("tools", "functions", "documents", "history")
"""What other trainers put into a chat's prompt, in their own ways."""


def refuse_leftovers(row: Row, columns: Columns, parts: Collection[str], setting: str | None) -> None:
    """Raises DataError if a row has an unread column among `parts` or OF_CHATS; `setting` names columns in its place.

    A column is read, too, if the columns in use have its texts, as a prompt beside the chat that it begins; or if it
    has theirs, as a text of the whole row.
    """
    used = astuple(columns)
    read = [row.cells.get(column) for column in used if column is not None]
    for name, value in row.cells.items():
        usual = name.strip().lower()
        if name in used or is_missing(value) or value in ([], {}):
            continue
        if usual in OF_CHATS:
            # A single text is a mark of its document, as in other tables.
            if usual in ("functions", "documents") and not isinstance(value, list):
                continue
            cure = ""
        elif usual in parts and not _is_repeated(value, read):
            cure = "" if setting is None else f"set {setting}, "
        else:
            continue
        raise DataError(
            f"{row.place}: column '{name}' is not read beside '{columns.text}', so a model would not learn it; "
            f"{cure}move it into the text, or remove it"
        )


def _is_repeated(value: Any, cells: Collection[Any]) -> bool:
    own, read = [*_texts(value)], [text for cell in cells for text in _texts(cell)]
    within = all(any(text in other for other in read) for text in own)
    return within or all(any(text in other for other in own) for text in read)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a cell, with single spaces; of messages without roles."""
    if isinstance(value, Mapping):
        value = [inner for key, inner in value.items() if key not in ("role", "from")]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    elif not is_missing(value):
        yield " ".join(str(value).split())
