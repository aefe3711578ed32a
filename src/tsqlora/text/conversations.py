"""Source rows as conversations, whatever the format. Nothing is refused: the audit reports it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tsqlora.data.examples import FURTHER, keys_of
from tsqlora.data.formats import FORMATS, PREFERENCE, SYSTEM, Format
from tsqlora.data.rows import is_missing

ANSWER = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its role by the names of chat templates, its text, and what else it carries."""

    role: str
    content: str
    further: Mapping[str, Any] = field(default_factory=dict)
    """Tool calls, reasoning and the like, as the row has them."""
    parts: bool = False
    """Whether the content was a list of parts, of which `content` has the texts."""

    @property
    def called(self) -> list[str]:
        """The names of the functions that it calls."""
        calls = self.further.get("tool_calls")
        calls = [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
        functions = [call.get("function", call) for call in calls]
        return [str(one["name"]) for one in functions if isinstance(one, Mapping) and one.get("name")]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row. Of a pair, `messages` end with the chosen answer, and `rejected` is the other one's."""

    row: int
    messages: tuple[Message, ...]
    problem: str | None = None
    """Why the row cannot be read; it has no messages then."""
    rejected: tuple[Message, ...] | None = None
    tools: Sequence[Any] | None = None
    prompt: tuple[Message, ...] | None = None
    """Of a pair whose answers are whole chats with different prompts: the rejected one's prompt."""
    plain: bool = False
    """Whether the row is plain text, without turns; its one message has the text."""

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == ANSWER else self.messages

    @property
    def answer(self) -> str:
        """The last answer; "" without one."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == ANSWER else ""


def conversation(cells: Mapping[str, Any], format: Format, row: int) -> Conversation:
    """Read one row; what cannot be read is its `problem`."""
    try:
        made = replace(_read(cells, format), row=row)
        for message in (*made.messages, *(made.rejected or ()), *(made.prompt or ())):
            f"{message.role}{message.content}".encode()  # no tokenizer reads half a surrogate pair
        return made
    except _UnreadableError as error:
        return Conversation(row, (), str(error))
    except UnicodeEncodeError:
        return Conversation(row, (), "a message holds half a surrogate pair (\\ud800..\\udfff); remove it")


class _UnreadableError(Exception):
    """A row that is no conversation."""


def _read(row: Mapping[str, Any], format: Format) -> Conversation:
    columns, tools = format.columns, row.get("tools") or None
    system = row.get(columns.system) if columns.system else next((row[c] for c in SYSTEM if row.get(c)), None)
    first = [] if is_missing(system) or not isinstance(system, str) else [Message("system", system)]
    if format.name == PREFERENCE:
        return replace(_pair(row, columns.text, first), tools=tools)
    cell = row.get(columns.text)
    if FORMATS[format.name].setting == "data.messages":
        own = _messages(cell, columns.text)
        return Conversation(0, (*([] if own and own[0].role == "system" else first), *own), tools=tools)
    if FORMATS[format.name].whole:
        return Conversation(0, (Message(ANSWER, _text(cell, columns.text)),), plain=True)
    if isinstance(cell, list):  # conversational prompt and completion
        answer = row.get(columns.label or "")
        own = _messages(answer, columns.label or "") if isinstance(answer, list) else [Message(ANSWER, str(answer))]
        return Conversation(0, (*first, *_messages(cell, columns.text), *own), tools=tools)
    further = row.get(columns.text_pair) if columns.text_pair else None
    prompt = _text(cell, columns.text) + (f"\n\n{further}" if further and not is_missing(further) else "")
    answer = row.get(columns.label or "")
    if isinstance(answer, Mapping):  # SQuAD's answers
        answer = next(iter(answer.get("text") or [""]), "")
    messages = (*first, Message("user", prompt), Message(ANSWER, "" if is_missing(answer) else str(answer)))
    return Conversation(0, messages, tools=tools)


def _pair(row: Mapping[str, Any], column: str, system: list[Message]) -> Conversation:
    prompt, sides = row.get(column), []
    before = _messages(prompt, column) if isinstance(prompt, list) else []
    if isinstance(prompt, str) and prompt.strip():
        before = [Message("user", prompt)]
    before = [*system, *before]
    for name in ("chosen", "rejected"):
        answer = row.get(name)
        if isinstance(answer, list):
            own = _messages(answer, name)
            sides.append((*([] if len(own) > 1 else before), *own))
        else:
            sides.append((*before, Message(ANSWER, "" if is_missing(answer) else _text(answer, name))))
    chosen, rejected = sides
    other = rejected[:-1] if rejected[:-1] != chosen[:-1] else None
    return Conversation(0, chosen, rejected=rejected[-1:], prompt=other)


def _messages(cell: Any, column: str) -> list[Message]:
    if is_missing(cell) or cell == []:
        raise _UnreadableError(f"no messages in column '{column}'")
    if not isinstance(cell, list) or not all(isinstance(message, Mapping) for message in cell):
        raise _UnreadableError(f"column '{column}' holds no list of messages")
    return [_message(message, number, column) for number, message in enumerate(cell, start=1)]


def _message(message: Mapping[str, Any], number: int, column: str) -> Message:
    keys = keys_of(message)
    role, content = message.get(keys.role), message.get(keys.content)
    if not isinstance(role, str):
        raise _UnreadableError(f"message {number} in column '{column}' has no {keys.role}")
    further = {key: message[key] for key in FURTHER if message.get(key)}
    if parts := isinstance(content, list):
        content = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    text = "" if is_missing(content) else str(content)
    return Message(keys.roles.get(role, role), text, further, parts)


def _text(cell: Any, column: str) -> str:
    if is_missing(cell):
        return ""
    if not isinstance(cell, str):
        raise _UnreadableError(f"column '{column}' holds a {type(cell).__name__}, not text")
    return cell
