"""A cell with a list of messages, by role and content or as ShareGPT's -> the turns of a chat, every one checked."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsqlora.data.cells import MissingError, as_text, is_missing
from tsqlora.data.columns import Columns
from tsqlora.data.formats.example import Chat, Manner, Turn
from tsqlora.data.rows import Rows
from tsqlora.errors import DataError, UnsupportedError, nearest

UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""What a message may hold beside its content, and a model would not learn from this row."""
_NOT_READ = "is not read here, so that a model would not learn it; write it into the text, or leave it out"


@dataclass(frozen=True, slots=True)
class Keys:
    """Which keys of a message hold role and content, and what each role is to a chat template."""

    role: str
    content: str
    roles: Mapping[str, str]


MESSAGES = Keys(
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

SHAREGPT = Keys(
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


def read_messages(rows: Rows, i: int, columns: Columns, manner: Manner) -> Chat:
    """Lists of {"role": …, "content": …}, as they stand."""
    return read_chat(rows, i, columns.text, manner, MESSAGES)


def read_sharegpt(rows: Rows, i: int, columns: Columns, manner: Manner) -> Chat:
    """Lists of {"from": …, "value": …}, by the names that chat templates know: human is user, gpt is assistant."""
    return read_chat(rows, i, columns.text, manner, SHAREGPT)


def read_chat(rows: Rows, i: int, column: str, manner: Manner, keys: Keys) -> Chat:
    """The turns of row i, up to the assistant's last; where targets are not read, all but an answer at the end.

    Raises DataError with file, row and message for what is no list of messages, a role that is not
    known, an empty content, what would not be learned (UNREAD), and a chat without a turn to write or to answer.
    """
    if manner.seq2seq:
        raise UnsupportedError(
            f"{rows.source}: chats in column '{column}' are for causal-lm; "
            "for seq2seq give columns of text: data.prompt and data.target"
        )
    place, messages = rows.place(i), rows.rows[i].get(column)
    if is_missing(messages) or messages == []:
        raise MissingError(place, f"no messages in column '{column}'")
    if not isinstance(messages, list):
        wanted = f'write a list of {{"{keys.role}": …, "{keys.content}": …}}'
        raise DataError(f"{place}: {_shown(messages)} in column '{column}' is no list of messages; {wanted}")
    refuse_unread(rows, i, ("tools", "system"))
    turns = tuple(_turn(message, number, place, column, keys) for number, message in enumerate(messages, start=1))
    answered = max((number for number, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    if manner.targets and not answered:
        raise MissingError(place, f"no assistant's turn in column '{column}'")
    if manner.targets:
        return Chat(turns[:answered])
    kept = turns[: answered - 1] if answered == len(turns) or (answered and manner.measured) else turns
    if not kept:
        raise DataError(f"{place}: nothing in column '{column}' to answer; begin it with a user's message")
    return Chat(kept)


def refuse_unread(rows: Rows, i: int, columns: Sequence[str]) -> None:
    """Raises DataError where one of these columns, which other trainers read beside a chat, holds something."""
    if unread := [column for column in columns if rows.rows[i].get(column)]:
        raise DataError(f"{rows.place(i)}: column '{unread[0]}' {_NOT_READ}")


def _turn(message: Any, number: int, place: str, column: str, keys: Keys) -> Turn:
    where = f"message {number} in column '{column}'"
    if not isinstance(message, dict):
        raise DataError(f"{place}: {where} is {_shown(message)}; write an object with {keys.role} and {keys.content}")
    for key in (keys.role, keys.content):
        if key not in message:
            other = "sharegpt (from, value)" if keys is MESSAGES else "messages (role, content)"
            raise DataError(f"{place}: {where} has no '{key}'; write it, or set data.format to {other}")
    role, content = message[keys.role], message[keys.content]
    if not isinstance(role, str) or role not in keys.roles:
        raise DataError(f"{place}: {where} has an unknown {keys.role}, {role!r}; {nearest(str(role), keys.roles)}")
    if unread := [key for key in UNREAD if message.get(key)]:
        raise DataError(f"{place}: {where} has '{unread[0]}', which {_NOT_READ}")
    if is_missing(content):
        raise MissingError(place, f"a message without text in column '{column}'")
    return Turn(keys.roles[role], as_text(content, f"'{keys.content}' of {where}", place))


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
