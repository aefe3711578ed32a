"""Preference rows as TRL has them: a chosen and a rejected answer, as texts or as messages, usually after a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tsqlora.data.cells import MissingError, Row, as_text, is_missing
from tsqlora.data.columns import Columns
from tsqlora.data.formats.chats import MESSAGES, Chat, Example, Manner, read_chat
from tsqlora.data.formats.texts import exchange, is_chat
from tsqlora.errors import DataError

PAIRS = Columns("prompt", "rejected", "chosen")


def require_pairs(names: Sequence[str], source: str) -> None:
    """Raises DataError without a column of chosen and one of rejected answers."""
    if missing := [name for name in ("chosen", "rejected") if name not in names]:
        raise DataError(
            f"{source} has no column '{missing[0]}'; preference rows have prompt, chosen and rejected, and its columns "
            f"are {', '.join(names)}"
        )


def read_pair(row: Row, columns: Columns, manner: Manner) -> Example | Chat:
    """The prompt, if any, with the answer in `columns.label`; `columns.text_pair` must have the other answer.

    What both answers begin with, such as the turns of a whole chat, cancels out of the loss.
    """
    cells, place = row.cells, row.place
    for name in (columns.label, columns.text_pair):
        if is_missing(answer := cells.get(name or "")) or answer == []:
            raise MissingError(place, f"no answer in column '{name}'")
    prompt, answer = cells.get(columns.text), cells[columns.label or ""]
    if isinstance(answer, list):
        before: list[Any] = prompt if isinstance(prompt, list) else []
        # Beside a whole chat, its first turn may be written once more as a text.
        if isinstance(prompt, str) and isinstance(answer[0], dict) and answer[0].get("role") == "assistant":
            before = [{"role": "user", "content": prompt}]
        chat = replace(row, cells={**cells, "messages": [*before, *answer]})
        return read_chat(chat, replace(columns, text="messages"), manner, MESSAGES)
    text = "" if is_missing(prompt) else as_text(prompt, f"column '{columns.text}'", place)
    answer = as_text(answer, f"column '{columns.label}'", place)
    return exchange(row, columns, text, answer, chat=is_chat(columns, manner))
