"""Chats as lists of {"from": …, "value": …}, as ShareGPT's are."""

from tsqlora.data.columns import Columns
from tsqlora.data.formats.chat import Keys, read_chat
from tsqlora.data.formats.example import Chat, Manner
from tsqlora.data.rows import Rows

KEYS = Keys(
    role="from",
    content="value",
    roles={
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "tool": "tool",
    },
)


def read(rows: Rows, i: int, columns: Columns, manner: Manner) -> Chat:
    """The same turns by the names that chat templates know: human is user, gpt is assistant."""
    return read_chat(rows, i, columns.text, manner, KEYS)
