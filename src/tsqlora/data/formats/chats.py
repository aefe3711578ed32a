"""Examples as a generating model reads them, and chats: lists of messages by role and content, or as in ShareGPT."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tsqlora.data.cells import MissingError, Row, as_text, is_missing, text_or_empty
from tsqlora.data.columns import Columns
from tsqlora.errors import DataError, UnsupportedError, nearest


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, "" for none, and its target; None if targets are not read."""

    prompt: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns for the tokenizer's chat template; every assistant's turn is a target.

    If targets are not read, the turns before the one to generate.
    """

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Manner:
    """How a model reads rows.

    Args:
        seq2seq: it has prompt and target on two sides; else it continues the prompt.
        chat: its tokenizer has a chat template.
        targets: whether targets are read, and thus required.
        measured: without `targets`, end a chat before its last answer, which a generated one is compared with.
    """

    seq2seq: bool
    chat: bool
    targets: bool = True
    measured: bool = False


UNREAD = ("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")
"""Keys of a message, beside its content, that a model would not learn."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of role and content in a message, and each role's name in chat templates."""

    role: str
    content: str
    roles: Mapping[str, str]


MESSAGES = Keys("role", "content", {name: name for name in ("system", "developer", "user", "assistant", "tool")})
SHAREGPT = Keys(
    "from",
    "value",
    {"system": "system", "human": "user", "user": "user", "tool": "tool"}
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
)


def read_messages(row: Row, columns: Columns, manner: Manner) -> Chat:
    """A list of {"role": …, "content": …}."""
    return read_chat(row, columns, manner, MESSAGES)


def read_sharegpt(row: Row, columns: Columns, manner: Manner) -> Chat:
    """A list of {"from": …, "value": …}, with the roles of chat templates: human is user, gpt is assistant."""
    return read_chat(row, columns, manner, SHAREGPT)


def read_chat(row: Row, columns: Columns, manner: Manner, keys: Keys) -> Chat:
    """The turns of a row up to the last answer, after its system prompt; without targets, all but a final answer.

    Raises DataError with file, row and message for a cell that is not a list of messages, unknown roles, empty
    contents, keys in UNREAD, weights, two system prompts, and a chat without a turn to write or to answer.
    """
    column = columns.text
    if manner.seq2seq:
        raise UnsupportedError(
            f"{row.source}: chats in column '{column}' need task.type causal-lm; "
            "for seq2seq give columns of text: data.prompt and data.target"
        )
    place, messages = row.place, row.cells.get(column)
    if is_missing(messages) or messages == []:
        raise MissingError(place, f"no messages in column '{column}'")
    if not isinstance(messages, list):
        cure = f'write a list of {{"{keys.role}": …, "{keys.content}": …}}'
        raise DataError(f"{place}: column '{column}' holds {_shown(messages)}, not a list of messages; {cure}")
    turns = tuple(_turn(message, number, place, column, keys) for number, message in enumerate(messages, start=1))
    system = Turn("system", text_or_empty(row, columns.system))
    if system.content and turns[0] != system:
        if turns[0].role == "system":
            raise DataError(
                f"{place}: column '{columns.system}' and column '{column}' have two system prompts; remove one"
            )
        turns = (system, *turns)
    answered = max((number for number, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    if manner.targets and not answered:
        raise MissingError(place, f"no assistant's turn in column '{column}'")
    if manner.targets:
        return Chat(turns[:answered])
    before = turns[: answered - 1] if answered == len(turns) or (answered and manner.measured) else turns
    if not before:
        raise DataError(f"{place}: column '{column}' has nothing to answer; start it with a user's message")
    return Chat(before)


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
        raise DataError(
            f"{place}: {where} has '{unread[0]}', which is not read, so a model would not learn it; move it into the "
            "text, or remove it"
        )
    weight = message.get("weight")
    if keys.roles[role] == "assistant" and not is_missing(weight) and str(weight) not in ("1", "1.0", "True"):
        raise DataError(
            f"{place}: {where} has the weight {weight!r}, and every answer is trained on alike; "
            "remove the message, or its weight"
        )
    if is_missing(content):
        raise MissingError(place, f"a message without text in column '{column}'")
    return Turn(keys.roles[role], as_text(content, f"'{keys.content}' of {where}", place))


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
