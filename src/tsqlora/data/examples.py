"""Rows as a generating model reads them: chats, prompts with answers, pairs of answers, plain text."""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
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
class Message:
    """One message of a chat; its role by the names of chat templates."""

    role: str
    content: str
    """Its text, of a list of parts their texts joined; "" for none."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Every other key of the row's message, and a content of null."""

    @property
    def whole(self) -> dict[str, Any]:
        """The message as a chat template gets it."""
        return {"role": self.role, "content": self.content, **self.further}

    @property
    def carried(self) -> list[str]:
        """Keys beside the content under which there is something to learn."""
        return [key for key in (*REASONING, *CALLS) if self.further.get(key)]

    @property
    def called(self) -> list[str]:
        """The names of the functions that it calls."""
        calls = self.further.get("tool_calls")
        calls = [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
        functions = [call.get("function", call) for call in calls]
        return [str(one["name"]) for one in functions if isinstance(one, Mapping) and one.get("name")]


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the tokenizer's chat template; every assistant's is a target, but for those of the `context`.

    If targets are not read, the messages before the one to generate.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Any] = ()
    """Definitions of tools, for a template that takes them."""
    context: int = 0
    """How many messages at the beginning have no target: those of a prompt that is a chat."""
    unanswered: tuple[Message, ...] = field(default=(), compare=False)
    """Messages of the row behind its last answer."""


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


ANSWER = "assistant"
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of the reasoning before an answer, in rows and in templates."""
Problems = list[DataError]
"""Collects why a row cannot be trained on, while the rest of it is read."""


ROLES = {name: name for name in ("system", "developer", "user", ANSWER, "tool")}
SHAREGPT = {"system": "system", "human": "user", "user": "user", "tool": "tool"} | dict.fromkeys(
    ("gpt", ANSWER, "chatgpt", "model"), ANSWER
)
"""Each role's name in chat templates, by that of the row."""


def read_chat(row: Row, columns: Columns, manner: Manner, problems: Problems) -> Chat:
    """The messages of a row up to the last answer, after its system prompt; without targets, all but a final answer.

    A chat is a list of {"role": …, "content": …}, or of {"from": …, "value": …}, where gpt is assistant.

    Problems, with file, row and message, are a cell that is not a list of messages, unknown roles, empty contents,
    parts that are no text, weights, two system prompts, and a chat without a message to write or to answer.
    """
    column, tools = columns.text, _tools(row, problems)
    messages = _messages(row, columns, manner, problems)
    answered = max((number for number, one in enumerate(messages, start=1) if one.role == ANSWER), default=0)
    if manner.targets:
        if messages and not answered:
            problems.append(MissingError(row.place, f"no assistant's turn in column '{column}'"))
        return Chat(messages[:answered], tools, unanswered=messages[answered:])
    before = messages[: answered - 1] if answered == len(messages) or (answered and manner.measured) else messages
    if not before:
        problems.append(
            DataError(f"{row.place}: column '{column}' has nothing to answer; start it with a user's message")
        )
    return Chat(before, tools)


def _messages(row: Row, columns: Columns, manner: Manner, problems: Problems) -> tuple[Message, ...]:
    """The messages in the column of texts, after the row's system prompt; none if one of them cannot be read."""
    column, place, cell = columns.text, row.place, row.cells.get(columns.text)
    if manner.seq2seq:
        raise UnsupportedError(
            f"{row.source}: chats in column '{column}' need task.type causal-lm; "
            "for seq2seq give columns of text: data.prompt and data.target"
        )
    if is_missing(cell) or not isinstance(cell, list) or not cell:
        cure = f'holds {_shown(cell)}, not a list of messages; write a list of {{"role": …, "content": …}}'
        lacks = MissingError(place, f"no messages in column '{column}'")
        problems.append(lacks if is_missing(cell) or cell == [] else DataError(f"{place}: column '{column}' {cure}"))
        return ()
    read = [_message(one, f"message {k} in column '{column}'", row, column, problems) for k, one in enumerate(cell, 1)]
    messages = tuple(one for one in read if one is not None)
    if len(messages) < len(read):
        return ()
    system = Message("system", tried(problems, text_or_empty, row, columns.system))
    if not system.content or (messages[0].role, messages[0].content) == ("system", system.content):
        return messages
    if messages[0].role != "system":
        return (system, *messages)
    problems.append(
        DataError(f"{place}: column '{columns.system}' and column '{column}' have two system prompts; remove one")
    )
    return messages


def tried(problems: Problems, read: Callable[..., str], *args: Any) -> str:
    """What `read` returns; "" where it raises a problem."""
    try:
        return read(*args)
    except DataError as error:
        problems.append(error)
        return ""


def _tools(row: Row, problems: Problems) -> Sequence[Any]:
    """The definitions in column `tools`, which may be JSON text."""
    tools = row.cells.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            problems.append(DataError(f"{row.place}: column 'tools' holds {_shown(tools)}, not a list in JSON"))
    return tools if isinstance(tools, list) else ()


def _message(message: Any, where: str, row: Row, column: str, problems: Problems) -> Message | None:
    """A message with all its keys; None for one without a role."""
    at = f"{row.place}: {where}"
    if not isinstance(message, dict):
        problems.append(DataError(f"{at} is {_shown(message)}; write an object with role and content"))
        return None
    # Arrow gives all messages in a column the keys of all.
    sharegpt = is_missing(message.get("role")) and not is_missing(message.get("from"))
    by, holds, roles = ("from", "value", SHAREGPT) if sharegpt else ("role", "content", ROLES)
    # A key of null is as good as none, but some templates ask whether a content is null.
    further = {key: value for key, value in message.items() if value is not None and key not in (by, holds)}
    further |= {"content": None} if message.get(holds) is None else {}
    calls = any(further.get(key) for key in CALLS)
    for key in (by, holds):
        if key not in message and not (calls and key == holds):
            problems.append(DataError(f"{at} has no '{key}'; write role and content, or from and value"))
    role, content, weight = message.get(by), message.get(holds), message.get("weight")
    if not isinstance(role, str) or role not in roles:
        problems.append(DataError(f"{at} has an unknown {by}, {role!r}; {nearest(str(role), roles)}"))
    if roles.get(str(role)) == ANSWER and not is_missing(weight) and str(weight) not in ("1", "1.0", "True"):
        problems.append(
            DataError(
                f"{at} has the weight {weight!r}, and every answer is trained on alike; "
                "remove the message, or its weight"
            )
        )
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        if other := next((part for part in content if not isinstance(part.get("text"), str)), None):
            problems.append(DataError(f"{at} has a part of type {other.get('type')!r}, and only texts are read"))
        content = "".join(str(part.get("text") or "") for part in content)
    if is_missing(content):
        content = ""
        if not calls:
            problems.append(MissingError(row.place, f"a message without text in column '{column}'"))
    text = tried(problems, as_text, content, f"'{holds}' of {where}", row.place)
    if not isinstance(role, str):
        return None
    return Message(roles.get(role) or tried(problems, as_text, role, f"'{by}' of {where}", row.place), text, further)


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


def _target(row: Row, columns: Columns, manner: Manner, problems: Problems) -> str | None:
    if not manner.targets or columns.label is None:
        return None
    cell = row.cells.get(columns.label)
    if not isinstance(cell, dict) or not isinstance(cell.get("text"), list):
        return tried(problems, text_at, row, columns.label)
    # SQuAD (Rajpurkar et al., 2016): all answers and their places; none has an unanswerable question of version 2.
    first = replace(row, cells={columns.label: next(iter(cell["text"]), None)})
    return tried(problems, text_at, first, columns.label)


def exchange(
    row: Row, columns: Columns, prompt: str, target: str | None, problems: Problems, *, chat: bool
) -> Example | Chat:
    """The row's system prompt, the prompt and its target: as a chat, or as text with a blank line after the first."""
    system = tried(problems, text_or_empty, row, columns.system)
    if not chat:
        return Example(f"{system}\n\n{prompt}" if system else prompt, target)
    before = [Message(role, text) for role, text in (("system", system), ("user", prompt)) if text]
    return Chat((*before, *([] if target is None else [Message(ANSWER, target)])))


def is_chat(columns: Columns, manner: Manner) -> bool:
    # By the column of system prompts, not by its cell: one file is read in one way.
    return columns.system is not None and manner.chat and not manner.seq2seq


def read_alpaca(row: Row, columns: Columns, manner: Manner, problems: Problems) -> Example | Chat:
    """A chat of one exchange if the tokenizer has a template, else Alpaca's own prompt.

    A sequence-to-sequence model reads instruction and input with a blank line between them.
    """
    instruction = tried(problems, text_at, row, columns.text)
    further = tried(problems, text_or_empty, row, columns.text_pair)
    output = _target(row, columns, manner, problems)
    plain = f"{instruction}\n\n{further}" if further else instruction
    if not manner.chat and not manner.seq2seq:
        plain = (WITH_INPUT if further else WITHOUT_INPUT).format(instruction=instruction, input=further)
    return exchange(row, columns, plain, output, problems, chat=manner.chat and not manner.seq2seq)


def read_prompt(row: Row, columns: Columns, manner: Manner, problems: Problems) -> Example | Chat:
    """A prompt and its completion with nothing between them: a space must be part of one of the texts.

    A context stands before the prompt, with a blank line between them, unless the prompt has it. A prompt of messages
    has a completion of messages, or of text; as in TRL only the completion is a target.
    """
    if isinstance(row.cells.get(columns.text), list):
        prompt, label = _messages(row, columns, manner, problems), columns.label or ""
        if not manner.targets:
            return Chat(prompt, _tools(row, problems))
        if not isinstance(row.cells.get(label), list):
            answer = Message(ANSWER, tried(problems, text_at, row, label))
            return Chat((*prompt, answer), _tools(row, problems), len(prompt))
        answers = read_chat(row, Columns(label, None, None), manner, problems)
        return replace(answers, messages=(*prompt, *answers.messages), context=len(prompt))
    target = _target(row, columns, manner, problems)
    prompt = tried(problems, text_at, row, columns.text)
    context = tried(problems, text_or_empty, row, columns.text_pair)
    plain = prompt if context in prompt else f"{context}\n\n{prompt}"
    return exchange(row, columns, plain, target, problems, chat=is_chat(columns, manner))


# Radford et al. (2019), GPT-2: the prompt for a summary.
TLDR = "\n\nTL;DR:"


def read_document(row: Row, columns: Columns, manner: Manner, problems: Problems) -> Example:
    """The document and "TL;DR:", then the summary; a sequence-to-sequence model reads the document alone.

    The space between them belongs to the summary: most tokenizers have words with the space before them.
    """
    document = tried(problems, text_at, row, columns.text)
    summary = _target(row, columns, manner, problems)
    if manner.seq2seq:
        return Example(document, summary)
    return Example(document + TLDR, None if summary is None else f" {summary}")


def read_text(row: Row, columns: Columns, manner: Manner, problems: Problems) -> Example:
    """Plain text: all target, or all prompt if targets are not read."""
    if manner.seq2seq:
        raise UnsupportedError(
            f"{row.source}: plain text in column '{columns.text}' has no target for a sequence-to-sequence model; "
            "set data.prompt and data.target"
        )
    text = tried(problems, text_at, row, columns.text)
    return Example("", text) if manner.targets else Example(text, None)


PAIRS = Columns("prompt", "rejected", "chosen")


def read_pair(row: Row, columns: Columns, manner: Manner, problems: Problems) -> Example | Chat:
    """The prompt, if any, with the answer in `columns.label`; `columns.text_pair` must have the other answer.

    What both answers begin with, such as the messages of a whole chat, cancels out of the loss.
    """
    cells, label = row.cells, columns.label or ""
    for name in (label, columns.text_pair or ""):
        if is_missing(cells.get(name)) or cells[name] == []:
            problems.append(MissingError(row.place, f"no answer in column '{name}'"))
    prompt, answer = cells.get(columns.text), cells.get(label)
    if not isinstance(prompt, list) and not isinstance(answer, list):
        prompt, answer = (
            "" if is_missing(cell) else tried(problems, as_text, cell, f"column '{name}'", row.place)
            for name, cell in ((columns.text, prompt), (label, answer))
        )
        return exchange(row, columns, prompt, answer, problems, chat=is_chat(columns, manner))
    before = prompt if isinstance(prompt, list) else []
    answers = answer if isinstance(answer, list) else [{"role": ANSWER, "content": answer}]
    # Beside a whole chat, its first message may be written once more as a text.
    if isinstance(prompt, str) and [one.get("role") for one in answers[:1] if isinstance(one, dict)] == [ANSWER]:
        before = [{"role": "user", "content": prompt}]
    again = next((k for k in range(len(before), 0, -1) if before[-k:] == answers[:k]), 0)
    joined = replace(row, cells={**cells, label: [*before[: len(before) - again], *answers]})
    return read_chat(joined, replace(columns, text=label), manner, problems)
