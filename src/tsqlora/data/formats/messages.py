"""Chats as lists of {"role": …, "content": …}."""

from tsqlora.data.columns import Columns
from tsqlora.data.formats.chat import Keys, read_chat
from tsqlora.data.formats.example import Chat, Manner
from tsqlora.data.rows import Rows

KEYS = Keys(
    role="role",
    content="content",
    roles={
        "system": "system",
        "developer": "developer",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
    },
)


def read(rows: Rows, i: int, columns: Columns, manner: Manner) -> Chat:
    """The messages as they stand."""
    return read_chat(rows, i, columns.text, manner, KEYS)
