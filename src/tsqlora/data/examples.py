"""Rows as a generating model reads them: chats, prompts with answers, pairs of answers, plain text."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tsqlora.data.rows import Columns, MissingError, Row, as_text, is_missing, text_at, text_or_empty
from tsqlora.errors import DataError, UnsupportedError, nearest


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, "" for none, and its target; None if targets are not read."""

    prompt: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat; `further` has its tool calls and the like, by the names that templates read."""

    role: str
    content: str
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns for the tokenizer's chat template; every assistant's turn is a target, but for those of the `context`.

    If targets are not read, the turns before the one to generate.
    """

    turns: tuple[Turn, ...]
    tools: Sequence[Any] = ()
    """Definitions of tools, for a template that takes them."""
    context: int = 0
    """How many turns at the beginning have no target: those of a prompt that is a chat."""


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


CALLS = ("tool_calls", "function_call")
FURTHER = (*CALLS, "reasoning", "reasoning_content", "thinking")
"""Keys of a message, beside its content, that some chat templates write."""


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


def keys_of(message: Mapping[str, Any]) -> Keys:
    """The keys of a message, whatever the name of its column; Arrow gives all messages in a column the keys of all."""
    return SHAREGPT if is_missing(message.get("role")) and not is_missing(message.get("from")) else MESSAGES


def read_chat(row: Row, columns: Columns, manner: Manner) -> Chat:
    """The turns of a row up to the last answer, after its system prompt; without targets, all but a final answer.

    A chat is a list of {"role": …, "content": …}, or of {"from": …, "value": …}, where gpt is assistant.

    Raises DataError with file, row and message for a cell that is not a list of messages, unknown roles, empty
    contents, parts that are no text, weights, two system prompts, and a chat without a turn to write or to answer.
    """
    column, place = columns.text, row.place
    turns, tools = _turns(row, columns, manner), _tools(row)
    answered = max((number for number, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    if manner.targets and not answered:
        raise MissingError(place, f"no assistant's turn in column '{column}'")
    if manner.targets:
        return Chat(turns[:answered], tools)
    before = turns[: answered - 1] if answered == len(turns) or (answered and manner.measured) else turns
    if not before:
        raise DataError(f"{place}: column '{column}' has nothing to answer; start it with a user's message")
    return Chat(before, tools)


def _turns(row: Row, columns: Columns, manner: Manner) -> tuple[Turn, ...]:
    """The messages in the column of texts, after the row's system prompt."""
    column, place, messages = columns.text, row.place, row.cells.get(columns.text)
    if manner.seq2seq:
        raise UnsupportedError(
            f"{row.source}: chats in column '{column}' need task.type causal-lm; "
            "for seq2seq give columns of text: data.prompt and data.target"
        )
    if is_missing(messages) or messages == []:
        raise MissingError(place, f"no messages in column '{column}'")
    if not isinstance(messages, list):
        cure = 'write a list of {"role": …, "content": …}'
        raise DataError(f"{place}: column '{column}' holds {_shown(messages)}, not a list of messages; {cure}")
    turns = tuple(_turn(message, number, place, column) for number, message in enumerate(messages, start=1))
    system = Turn("system", text_or_empty(row, columns.system))
    if system.content and turns[0] != system:
        if turns[0].role == "system":
            raise DataError(
                f"{place}: column '{columns.system}' and column '{column}' have two system prompts; remove one"
            )
        turns = (system, *turns)
    return turns


def _tools(row: Row) -> Sequence[Any]:
    """The definitions in column `tools`, which may be JSON text."""
    tools = row.cells.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError(f"{row.place}: column 'tools' holds {_shown(tools)}, not a list in JSON") from None
    return _without_none(tools) if isinstance(tools, list) else ()


def _without_none(value: Any) -> Any:
    """The value without null fields: Arrow gives all objects in a column the fields of all."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _turn(message: Any, number: int, place: str, column: str) -> Turn:
    where = f"message {number} in column '{column}'"
    if not isinstance(message, dict):
        raise DataError(f"{place}: {where} is {_shown(message)}; write an object with role and content")
    keys = keys_of(message)
    further = {key: _without_none(message[key]) for key in FURTHER if message.get(key)}
    calls = any(key in further for key in CALLS)
    for key in (keys.role, keys.content):
        if key not in message and not (calls and key == keys.content):
            raise DataError(f"{place}: {where} has no '{key}'; write role and content, or from and value")
    role, content = message[keys.role], message.get(keys.content)
    if not isinstance(role, str) or role not in keys.roles:
        raise DataError(f"{place}: {where} has an unknown {keys.role}, {role!r}; {nearest(str(role), keys.roles)}")
    weight = message.get("weight")
    if keys.roles[role] == "assistant" and not is_missing(weight) and str(weight) not in ("1", "1.0", "True"):
        raise DataError(
            f"{place}: {where} has the weight {weight!r}, and every answer is trained on alike; "
            "remove the message, or its weight"
        )
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        if other := next((part for part in content if not isinstance(part.get("text"), str)), None):
            raise DataError(f"{place}: {where} has a part of type {other.get('type')!r}, and only texts are read")
        content = "".join(part["text"] for part in content)
    if is_missing(content):
        if not calls:
            raise MissingError(place, f"a message without text in column '{column}'")
        content = ""
    return Turn(keys.roles[role], as_text(content, f"'{keys.content}' of {where}", place), further)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


# Taori et al. (2023), Stanford Alpaca: the two prompts of its training code.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def _target(row: Row, columns: Columns, manner: Manner) -> str | None:
    if not manner.targets or columns.label is None:
        return None
    cell = row.cells.get(columns.label)
    if not isinstance(cell, dict) or not isinstance(cell.get("text"), list):
        return text_at(row, columns.label)
    # SQuAD (Rajpurkar et al., 2016): all answers and their places; none has an unanswerable question of version 2.
    first = next(iter(cell["text"]), None)
    if is_missing(first):
        raise MissingError(row.place, f"no text in column '{columns.label}'")
    return as_text(first, f"column '{columns.label}'", row.place)


def exchange(row: Row, columns: Columns, prompt: str, target: str | None, *, chat: bool) -> Example | Chat:
    """The row's system prompt, the prompt and its target: as a chat, or as text with a blank line after the first."""
    system = text_or_empty(row, columns.system)
    if chat:
        turns = (Turn("system", system), Turn("user", prompt), Turn("assistant", target or ""))
        return Chat(tuple(turn for turn in turns if turn.content))
    return Example(f"{system}\n\n{prompt}" if system else prompt, target)


def is_chat(columns: Columns, manner: Manner) -> bool:
    # By the column of system prompts, not by its cell: one file is read in one way.
    return columns.system is not None and manner.chat and not manner.seq2seq


def read_alpaca(row: Row, columns: Columns, manner: Manner) -> Example | Chat:
    """A chat of one exchange if the tokenizer has a template, else Alpaca's own prompt.

    A sequence-to-sequence model reads instruction and input with a blank line between them.
    """
    instruction = text_at(row, columns.text)
    further = text_or_empty(row, columns.text_pair)
    output = _target(row, columns, manner)
    plain = f"{instruction}\n\n{further}" if further else instruction
    if not manner.chat and not manner.seq2seq:
        plain = (WITH_INPUT if further else WITHOUT_INPUT).format(instruction=instruction, input=further)
    return exchange(row, columns, plain, output, chat=manner.chat and not manner.seq2seq)


def read_prompt(row: Row, columns: Columns, manner: Manner) -> Example | Chat:
    """A prompt and its completion with nothing between them: a space must be part of one of the texts.

    A context stands before the prompt, with a blank line between them, unless the prompt has it. A prompt of messages
    has a completion of messages, or of text; as in TRL only the completion is a target.
    """
    if isinstance(row.cells.get(columns.text), list):
        prompt, label = _turns(row, columns, manner), columns.label or ""
        if not manner.targets:
            return Chat(prompt, _tools(row))
        if not isinstance(row.cells.get(label), list):
            return Chat((*prompt, Turn("assistant", text_at(row, label))), _tools(row), len(prompt))
        answer = read_chat(row, Columns(label, None, None), manner)
        return replace(answer, turns=(*prompt, *answer.turns), context=len(prompt))
    target = _target(row, columns, manner)
    prompt, context = text_at(row, columns.text), text_or_empty(row, columns.text_pair)
    plain = prompt if context in prompt else f"{context}\n\n{prompt}"
    return exchange(row, columns, plain, target, chat=is_chat(columns, manner))


# Radford et al. (2019), GPT-2: the prompt for a summary.
TLDR = "\n\nTL;DR:"


def read_document(row: Row, columns: Columns, manner: Manner) -> Example:
    """The document and "TL;DR:", then the summary; a sequence-to-sequence model reads the document alone.

    The space between them belongs to the summary: most tokenizers have words with the space before them.
    """
    document = text_at(row, columns.text)
    summary = _target(row, columns, manner)
    if manner.seq2seq:
        return Example(document, summary)
    return Example(document + TLDR, None if summary is None else f" {summary}")


def read_text(row: Row, columns: Columns, manner: Manner) -> Example:
    """Plain text: all target, or all prompt if targets are not read."""
    if manner.seq2seq:
        raise UnsupportedError(
            f"{row.source}: plain text in column '{columns.text}' has no target for a sequence-to-sequence model; "
            "set data.prompt and data.target"
        )
    text = text_at(row, columns.text)
    return Example("", text) if manner.targets else Example(text, None)


PAIRS = Columns("prompt", "rejected", "chosen")


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
        label = columns.label or ""
        chat = replace(row, cells={**cells, label: [*before, *answer]})
        return read_chat(chat, replace(columns, text=label), manner)
    text = "" if is_missing(prompt) else as_text(prompt, f"column '{columns.text}'", place)
    answer = as_text(answer, f"column '{columns.label}'", place)
    return exchange(row, columns, text, answer, chat=is_chat(columns, manner))
