"""Rows as a generating model reads them: chats, prompts with answers, pairs of answers, plain text."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
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


def read_chat(row: Row, columns: Columns, manner: Manner, *, keys: Keys = MESSAGES) -> Chat:
    """The turns of a row up to the last answer, after its system prompt; without targets, all but a final answer.

    A chat is a list of {"role": …, "content": …}; with SHAREGPT, of {"from": …, "value": …}, where gpt is assistant.

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

    A context stands before the prompt, with a blank line between them, unless the prompt has it.
    """
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
        chat = replace(row, cells={**cells, "messages": [*before, *answer]})
        return read_chat(chat, replace(columns, text="messages"), manner)
    text = "" if is_missing(prompt) else as_text(prompt, f"column '{columns.text}'", place)
    answer = as_text(answer, f"column '{columns.label}'", place)
    return exchange(row, columns, text, answer, chat=is_chat(columns, manner))
