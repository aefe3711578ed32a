"""Chats, prompts with answers, pairs of answers and plain text: find a file's format, and read its rows."""

import ast
import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from shlex import quote
from typing import Any

from tsqlora.errors import DataError, SettingsError, UnsupportedError, nearest
from tsqlora.rows.rows import (
    USUAL_PAIR,
    USUAL_TEXT,
    Columns,
    MissingError,
    Row,
    as_text,
    find_columns,
    is_missing,
    lacking,
    named_columns,
    quoted,
)


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
    """A row as messages, or why it has none: what training, the ledger and the judges read.

    Of `messages` every assistant's is a target, but for those of the `context`. If targets are not read, they are those
    before the one to generate.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Any] = ()
    """Definitions of tools, for a template that takes them."""
    context: int = 0
    """How many messages at the beginning have no target: those of a prompt that is a chat."""
    unanswered: tuple[Message, ...] = field(default=(), compare=False)
    """Messages of the row behind its last answer."""
    plain: bool = False
    """Whether prompt and target follow each other as they are, in place of turns that a chat template renders."""
    document: bool = field(default=False, compare=False)
    """Whether the row is one text without a prompt, all of it a target."""
    rejected: "Chat | None" = None
    """Of a pair, whose chosen side this is, the other one."""
    row: int = field(default=0, compare=False)
    place: str = field(default="", compare=False)
    """File and line, for errors."""
    problems: Sequence[DataError] = field(default=(), compare=False)
    """Why the row cannot be trained on."""

    @property
    def whole(self) -> tuple[Message, ...]:
        """All messages of the row."""
        return (*self.messages, *self.unanswered)

    @property
    def problem(self) -> str | None:
        """Why the row has no messages at all."""
        return None if self.whole or not self.problems else str(self.problems[0]).removeprefix(f"{self.place}: ")

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        return self.whole[:-1] if self.ends_answered else self.whole

    @property
    def answer(self) -> str:
        """The answer that the row ends with; "" without one."""
        return self.whole[-1].content if self.ends_answered else ""

    @property
    def ends_answered(self) -> bool:
        return not self.unanswered and [one.role for one in self.messages[-1:]] == [ANSWER]

    def side(self, side: str) -> tuple[Message, ...]:
        """The messages of one side of a pair, or of a row that is none."""
        return self.rejected.whole if side == "rejected" and self.rejected is not None else self.whole


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


PLAINLY = Manner(seq2seq=False, chat=False)
WHOLE = Manner(seq2seq=False, chat=True)

ANSWER = "assistant"
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of the reasoning before an answer, in rows and in templates."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A row that is being read: its columns, for which model, and the problems so far."""

    row: Row
    columns: Columns
    manner: Manner
    problems: list[DataError] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.problems.append(DataError(f"{self.row.place}: {what}"))

    def lack(self, what: str) -> None:
        self.problems.append(MissingError(self.row.place, what))

    def text(self, column: str | None, *, optional: bool = False) -> str:
        """The text in a column; "" where there is none, which is a problem unless it is optional."""
        value = None if column is None else self.row.cells.get(column)
        if not is_missing(value):
            return self.valid(value, f"column '{column}'")
        if not optional:
            self.lack(f"no text in column '{column}'")
        return ""

    def valid(self, value: Any, where: str) -> str:
        """The value itself; "" with a problem if it is no text."""
        try:
            return as_text(value, where, self.row.place)
        except DataError as error:
            self.problems.append(error)
            return ""


ROLES = {name: name for name in ("system", "developer", "user", ANSWER, "tool")}
SHAREGPT = {"system": "system", "human": "user", "user": "user", "tool": "tool"} | dict.fromkeys(
    ("gpt", ANSWER, "chatgpt", "model"), ANSWER
)
"""Each role's name in chat templates, by that of the row."""


def read_chat(its: Reading) -> Chat:
    """The messages of a row up to the last answer, after its system prompt; without targets, all but a final answer.

    A chat is a list of {"role": …, "content": …}, or of {"from": …, "value": …}, where gpt is assistant.

    Problems, with file, row and message, are a cell that is not a list of messages, unknown roles, empty contents,
    parts that are no text, weights, two system prompts, and a chat without a message to write or to answer.
    """
    column, tools, messages = its.columns.text, _tools(its), _messages(its)
    answered = max((number for number, one in enumerate(messages, start=1) if one.role == ANSWER), default=0)
    if its.manner.targets:
        if messages and not answered:
            its.lack(f"no assistant's turn in column '{column}'")
        return Chat(messages[:answered], tools, unanswered=messages[answered:])
    ends = answered == len(messages) or (answered and its.manner.measured)
    before = messages[: answered - 1] if ends else messages
    if not before:
        its.fail(f"column '{column}' has nothing to answer; start it with a user's message")
    return Chat(before, tools)


def _messages(its: Reading) -> tuple[Message, ...]:
    """The messages in the column of texts, after the row's system prompt; none if one of them cannot be read."""
    column, cell = its.columns.text, its.row.cells.get(its.columns.text)
    if its.manner.seq2seq:
        raise UnsupportedError(
            f"{its.row.source}: chats in column '{column}' need task.type causal-lm; "
            "for seq2seq give columns of text: data.prompt and data.target"
        )
    if is_missing(cell) or cell == []:
        its.lack(f"no messages in column '{column}'")
        return ()
    if not isinstance(cell, list):
        cure = 'write a list of {"role": …, "content": …}'
        its.fail(f"column '{column}' holds {_shown(cell)}, not a list of messages; {cure}")
        return ()
    read = [_message(its, one, f"message {number} in column '{column}'") for number, one in enumerate(cell, 1)]
    messages = tuple(one for one in read if one is not None)
    if len(messages) < len(read):
        return ()
    system = Message("system", its.text(its.columns.system, optional=True))
    if not system.content or (messages[0].role, messages[0].content) == ("system", system.content):
        return messages
    if messages[0].role != "system":
        return (system, *messages)
    its.fail(f"column '{its.columns.system}' and column '{column}' have two system prompts; remove one")
    return messages


def _tools(its: Reading) -> Sequence[Any]:
    """The definitions in column `tools`, which may be JSON text."""
    tools = its.row.cells.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            its.fail(f"column 'tools' holds {_shown(tools)}, not a list in JSON")
    return tools if isinstance(tools, list) else ()


def _message(its: Reading, message: Any, where: str) -> Message | None:
    """A message with all its keys; None for one without a role."""
    if not isinstance(message, dict):
        its.fail(f"{where} is {_shown(message)}; write an object with role and content")
        return None
    # Arrow gives all messages in a column the keys of all.
    sharegpt = is_missing(message.get("role")) and not is_missing(message.get("from"))
    by, holds, roles = ("from", "value", SHAREGPT) if sharegpt else ("role", "content", ROLES)
    role, content, weight = message.get(by), message.get(holds), message.get("weight")
    role = role.strip().lower() if isinstance(role, str) and role not in roles else role
    # A key of null is as good as none, but some templates ask whether a content is null.
    further = {key: value for key, value in message.items() if value is not None and key not in (by, holds)}
    further |= {"content": None} if content is None else {}
    calls = any(further.get(key) for key in CALLS)
    for key in (by, holds):
        if key not in message and not (calls and key == holds):
            its.fail(f"{where} has no '{key}'; write role and content, or from and value")
    if not isinstance(role, str) or role not in roles:
        its.fail(f"{where} has an unknown {by}, {role!r}; {nearest(str(role), roles)}")
    if roles.get(str(role)) == ANSWER and not is_missing(weight) and str(weight) not in ("1", "1.0", "True"):
        its.fail(
            f"{where} has the weight {weight!r}, and every answer is trained on alike; "
            "remove the message, or its weight"
        )
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        if other := next((part for part in content if not isinstance(part.get("text"), str)), None):
            its.fail(f"{where} has a part of type {other.get('type')!r}, and only texts are read")
        content = "".join(str(part.get("text") or "") for part in content)
    if is_missing(content):
        content = ""
        if not calls:
            its.lack(f"a message without text in column '{its.columns.text}'")
    text = its.valid(content, f"'{holds}' of {where}")
    if not isinstance(role, str):
        return None
    return Message(roles.get(role) or its.valid(role, f"'{by}' of {where}"), text, further)


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


def _target(its: Reading) -> str | None:
    column = its.columns.label
    if not its.manner.targets or column is None:
        return None
    cell = its.row.cells.get(column)
    if isinstance(cell, dict) and isinstance(cell.get("text"), list):
        # SQuAD (Rajpurkar et al., 2016): all answers and their places; none has an unanswerable question of version 2.
        its = replace(its, row=replace(its.row, cells={column: next(iter(cell["text"]), None)}))
    return its.text(column)


def exchange(its: Reading, prompt: str, target: str | None, *, chat: bool) -> Chat:
    """The row's system prompt, the prompt and its target: as a chat, or as text with a blank line after the first."""
    system = its.text(its.columns.system, optional=True)
    if system and not chat:
        system, prompt = "", f"{system}\n\n{prompt}"
    before = [Message(role, text) for role, text in (("system", system), ("user", prompt)) if text]
    return Chat((*before, *([] if target is None else [Message(ANSWER, target)])), plain=not chat)


def is_chat(its: Reading) -> bool:
    # By the column of system prompts, not by its cell: one file is read in one way.
    return its.columns.system is not None and its.manner.chat and not its.manner.seq2seq


def read_alpaca(its: Reading) -> Chat:
    """A chat of one exchange if the tokenizer has a template, else Alpaca's own prompt.

    A sequence-to-sequence model reads instruction and input with a blank line between them.
    """
    instruction, further = its.text(its.columns.text), its.text(its.columns.text_pair, optional=True)
    plain = f"{instruction}\n\n{further}" if further else instruction
    if not its.manner.chat and not its.manner.seq2seq:
        plain = (WITH_INPUT if further else WITHOUT_INPUT).format(instruction=instruction, input=further)
    return exchange(its, plain, _target(its), chat=its.manner.chat and not its.manner.seq2seq)


def read_prompt(its: Reading) -> Chat:
    """A prompt and its completion with nothing between them: a space must be part of one of the texts.

    A context stands before the prompt, with a blank line between them, unless the prompt has it. A prompt of messages
    has a completion of messages, or of text; as in TRL only the completion is a target.
    """
    if isinstance(its.row.cells.get(its.columns.text), list):
        messages, label = _messages(its), its.columns.label or ""
        if its.manner.targets and isinstance(its.row.cells.get(label), list):
            answers = read_chat(replace(its, columns=Columns(label, None, None)))
            return replace(answers, messages=(*messages, *answers.messages), context=len(messages))
        if not its.manner.targets:
            return Chat(messages, _tools(its))
        return Chat((*messages, Message(ANSWER, its.text(label))), _tools(its), len(messages))
    target, prompt = _target(its), its.text(its.columns.text)
    context = its.text(its.columns.text_pair, optional=True)
    return exchange(its, prompt if context in prompt else f"{context}\n\n{prompt}", target, chat=is_chat(its))


# Radford et al. (2019), GPT-2: the prompt for a summary.
TLDR = "\n\nTL;DR:"


def read_document(its: Reading) -> Chat:
    """The document and "TL;DR:", then the summary; a sequence-to-sequence model reads the document alone.

    The space between them belongs to the summary: most tokenizers have words with the space before them.
    """
    document, summary = its.text(its.columns.text), _target(its)
    if not its.manner.seq2seq:
        document, summary = document + TLDR, None if summary is None else f" {summary}"
    return exchange(its, document, summary, chat=False)


def read_text(its: Reading) -> Chat:
    """Plain text: all target, or all prompt if targets are not read."""
    if its.manner.seq2seq:
        raise UnsupportedError(
            f"{its.row.source}: plain text in column '{its.columns.text}' has no target for a sequence-to-sequence "
            "model; set data.prompt and data.target"
        )
    role = ANSWER if its.manner.targets else "user"
    return Chat((Message(role, its.text(its.columns.text)),), plain=True, document=its.manner.targets)


def read_pair(its: Reading) -> Chat:
    """The prompt, if any, with the answer in `columns.label`; `columns.text_pair` must have the other answer.

    What both answers begin with, such as the messages of a whole chat, cancels out of the loss.
    """
    cells, column, label = its.row.cells, its.columns.text, its.columns.label or ""
    for name in (label, its.columns.text_pair or ""):
        if is_missing(cells.get(name)) or cells[name] == []:
            its.lack(f"no answer in column '{name}'")
    prompt, answer = cells.get(column), cells.get(label)
    if not isinstance(prompt, list) and not isinstance(answer, list):
        return exchange(its, *(its.text(name, optional=True) for name in (column, label)), chat=is_chat(its))
    before = prompt if isinstance(prompt, list) else []
    answers = answer if isinstance(answer, list) else [{"role": ANSWER, "content": answer}]
    # Beside a whole chat, its first message may be written once more as a text.
    if isinstance(prompt, str) and [one.get("role") for one in answers[:1] if isinstance(one, dict)] == [ANSWER]:
        before = [{"role": "user", "content": prompt}]
    again = next((k for k in range(len(before), 0, -1) if before[-k:] == answers[:k]), 0)
    joined = replace(its.row, cells={**cells, label: [*before[: len(before) - again], *answers]})
    return read_chat(replace(its, row=joined, columns=replace(its.columns, text=label)))


@dataclass(frozen=True, slots=True)
class Kind:
    """A row format: a reader, and the usual names of its columns.

    Args:
        read: what a row says.
        usual: pairs of prompt and target; the target is None if one column holds both.
        further: names for a second part of the prompt, which is optional.
        setting: the settings that name its columns.
        system: whether a system prompt may stand in another column.
    """

    read: Callable[[Reading], Chat]
    usual: tuple[tuple[str, str | None], ...]
    further: tuple[str, ...] = ()
    setting: str = "data.prompt and data.target"
    system: bool = True


# In order of detection: a file of chats may also have their text in one piece.
FORMATS: dict[str, Kind] = {
    "messages": Kind(read_chat, (("messages", None),), setting="data.messages"),
    "sharegpt": Kind(read_chat, (("conversations", None), ("conversation", None)), setting="data.messages"),
    "alpaca": Kind(read_alpaca, (("instruction", "output"), ("instruction", "response")), further=("input", "context")),
    "prompt": Kind(
        read_prompt,
        (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("prompt", "target"),
            ("question", "answer"),
            ("question", "answers"),
            ("question", "response"),
            ("query", "response"),
            ("user", "assistant"),
            ("input", "output"),
            ("input", "target"),
        ),
        further=("context", "passage", "document", "article"),
    ),
    "document": Kind(
        read_document,
        (
            ("document", "summary"),
            ("article", "highlights"),
            ("article", "summary"),
            ("article", "abstract"),
            ("dialogue", "summary"),
            ("text", "summary"),
            ("text", "target"),
            ("source", "target"),
        ),
        system=False,
    ),
    "text": Kind(read_text, (("text", None), ("content", None)), setting="data.text", system=False),
}

PREFERENCE = "preference"
"""The name of the format of preference rows, which is their task's alone."""
OF_PAIRS = Kind(read_pair, (), setting="")

PROMPTS = ("prompt", "question", "instruction", "input")
SYSTEM = ("system", "system_prompt")
ABOUT = ("id", "idx", "index", "uuid", "", "unnamed: 0", *SYSTEM)
"""Columns that are hardly a prompt."""
_PAIRS = [pair for kind in FORMATS.values() for pair in kind.usual]
ANSWERS = {target for _, target in _PAIRS if target is not None} | {"chosen", "rejected"}
"""Usual names of answers, which no prompt needs."""
PARTS = (
    {*(name for name, _ in _PAIRS), *(name for kind in FORMATS.values() for name in kind.further), *ANSWERS, *SYSTEM}
    | {*USUAL_TEXT, *USUAL_PAIR.values(), "choices", "options"}
) - {"source"}
"""Usual names of texts that belong to a row. Others, such as id, source, title or score, are about it."""


@dataclass(frozen=True, slots=True)
class Format:
    """The format of a file: its name in FORMATS, and its columns.

    `columns.text` is the prompt (or the column of both), `text_pair` its second part, `label` the target: the names
    that `row_hash` reads. `whole` is False if settings name all columns, so that others do not belong to the row.
    """

    name: str
    columns: Columns
    whole: bool = field(default=True, compare=False)

    def read(self, row: Row, manner: Manner) -> Chat:
        """A row as prompt and target.  Raises DataError if it is not whole, or the model would not read all of it."""
        chat = self.parse(row, manner)
        if chat.problems:
            raise chat.problems[0]
        return chat

    def parse(self, row: Row, manner: Manner) -> Chat:
        """What can be read of a row, and why it cannot be trained on, such as an unread column in PARTS."""
        kind = OF_PAIRS if self.name == PREFERENCE else FORMATS[self.name]
        whole = row if kind.setting == "data.text" else _with_chats(row, self.columns)
        chat = kind.read(its := Reading(whole, self.columns, manner))
        parts = PARTS if manner.targets else PARTS - ANSWERS
        its.problems.extend(leftovers(whole, self.columns, parts if self.whole else (), kind.setting, bool(chat.tools)))
        if manner.targets and self.columns.label is not None and row.cells.get("label") is False:  # rows for KTO
            its.fail("'label' is false: nobody wants this answer, and every answer is trained on alike; remove the row")
        return replace(chat, row=row.id, place=row.place, problems=its.problems)

    def show(self, row: Row, sides: Sequence[Chat] = ()) -> Chat:
        """A row as its messages, which need not be whole; a pair of its `sides`, where they are parsed already."""
        chosen, *others = sides or [side.parse(row, WHOLE) for side in self.sides]
        return replace(chosen, rejected=others[0] if others[0].whole else chosen) if others and chosen.whole else chosen

    def lacks(self, row: Row, *, answers: bool = True) -> tuple[str | None, bool]:
        """What a row lacks, in words, with `answers` also a target; and whether a chat goes on behind its last answer.

        Any other problem is raised where the row is tokenised.
        """
        both = [(side.columns.label, side.parse(row, replace(PLAINLY, targets=answers))) for side in self.sides]
        goes_on = bool(both[0][1].messages and both[0][1].unanswered)
        for target, chat in both:
            if chat.problems and isinstance(first := chat.problems[0], MissingError):
                return lacking(row.cells, {target: "target"} if target and answers else {}) or first.what, goes_on
        return None, goes_on

    @property
    def sides(self) -> tuple["Format", ...]:
        """The format of each answer: of a pair, of the chosen and of the rejected one."""
        if self.name != PREFERENCE:
            return (self,)
        columns = self.columns
        return self, replace(self, columns=replace(columns, text_pair=columns.label, label=columns.text_pair))


def _with_chats(row: Row, columns: Columns) -> Row:
    """The row with the chats that a table holds as text."""
    cells = {name: row.cells.get(name) for name in (columns.text, columns.text_pair, columns.label) if name}
    chats = {name: chat for name, cell in cells.items() if isinstance(cell, str) and (chat := _chat_in(cell))}
    return replace(row, cells={**row.cells, **chats}) if chats else row


def _chat_in(text: str) -> list[Any] | None:
    """The messages in a text, as JSON or Python writes them; None for any other text."""
    for read in (json.loads, ast.literal_eval) if re.match(r"\s*\[\s*\{", text) else ():
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            chat = read(text.strip())
            if all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in chat):
                return chat
    return None


def pair_format(names: Sequence[str], *, source: str) -> Format:
    """The format of preference rows.  Raises DataError without chosen or rejected answers."""
    if missing := [name for name in ("chosen", "rejected") if name not in names]:
        raise DataError(
            f"{source} has no column '{missing[0]}'; preference rows have prompt, chosen and rejected, and its columns "
            f"are {', '.join(names)}"
        )
    prompt = _usual(PROMPTS, names) or "prompt"
    return Format(PREFERENCE, Columns(prompt, "rejected", "chosen", system=_usual(SYSTEM, names)))


def format_of(names: Sequence[str], source: str, **named: str | None) -> Format:
    """Find the format by the columns, or by `named` ones.  Raises DataError if no format of texts fits."""
    if {"chosen", "rejected"} <= {*names} and not any(named.values()):
        return pair_format(names, source=source)
    return find_format(names, source=source, **named)


def unlabelled_format(names: Sequence[str], source: str) -> Format | None:
    """The format of texts without labels by their columns; None for labelled rows, and for others."""
    with suppress(DataError):  # no column of a text to classify
        if find_columns(names, source=source).label is not None:
            return None
    with suppress(DataError):
        return format_of(names, source)
    return None


def are_answers(names: Sequence[str]) -> bool:
    """Whether columns without labels are those of chats, instructions, or prompts with answers.

    >>> are_answers(["messages"]), are_answers(["text", "summary"]), are_answers(["question", "answer", "label"])
    (True, False, False)
    """
    format = unlabelled_format(names, "")
    return format is not None and format.name in ("messages", "sharegpt", "alpaca", "prompt")


def find_format(
    names: Sequence[str],
    *,
    source: str,
    format: str | None = None,
    prompt: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    text: str | None = None,
) -> Format:
    """Detect the format by its usual columns, in the order of FORMATS; columns that settings name win.

    Raises DataError for a named column that is missing and if no format fits, SettingsError for settings that
    contradict each other.

    >>> find_format(["document", "summary"], source="a.jsonl")
    Format(name='document', columns=Columns(text='document', text_pair=None, label='summary'))
    """
    named = {"data.prompt": prompt, "data.target": target, "data.messages": messages, "data.text": text}
    prompt, target, messages, text = named_columns(named, names, source)
    _check_together(format, {key for key, name in named.items() if name is not None})
    if whole := messages or text:
        setting = "data.messages" if messages else "data.text"
        fitting = [name for name, kind in FORMATS.items() if kind.setting == setting]
        # Usual names distinguish messages from sharegpt.
        name = format or next((name for name in fitting if (whole, None) in FORMATS[name].usual), fitting[0])
        return Format(name, _columns_of(FORMATS[name], whole, None, names), whole=False)
    kinds, names_there = FORMATS if format is None else {format: FORMATS[format]}, {*names}
    pairs = [(name, *pair) for name, kind in kinds.items() for pair in kind.usual]
    # Two usual columns win over a named column beside a usual one.
    usual = [
        one
        for one in pairs
        if (prompt or one[1], target or one[2]) == one[1:]
        and {*one[1:]} - {None} <= names_there
        and (one[2] or not prompt)
    ]
    one_named = (prompt is None) != (target is None)
    beside_named = [one for one in pairs if one_named and one[2] and one[1 if prompt is None else 2] in names_there]
    for name, first, second in [*usual, *beside_named]:
        columns = _columns_of(FORMATS[name], prompt or first, target or second, names)
        return Format(name, columns, whole=prompt is None or target is None)
    if prompt is None or target is None:
        beside = f" beside '{prompt or target}'" if prompt or target else ""
        what = "columns of any row format" if format is None else f"usual columns of data.format {format}"
        others = iter([name for name in names if name not in (prompt, target) and name.lower() not in ABOUT])
        both = {"data.prompt": prompt or next(others, None), "data.target": target or next(others, None)}
        line = " ".join(f"--set {quote(f'{key}={name}')}" for key, name in both.items() if name)
        raise DataError(
            f"{source} has no {what}{beside}; add {line}, or set data.messages or data.text; columns: {quoted(names)}"
        )
    if format is None:
        columns = _columns_of(FORMATS["prompt"], prompt, target, names)
        return Format("prompt", replace(columns, text_pair=None), whole=False)
    return Format(format, _columns_of(FORMATS[format], prompt, target, names), whole=False)


def _columns_of(kind: Kind, prompt: str, target: str | None, names: Collection[str]) -> Columns:
    others = [name for name in names if name not in (prompt, target)]
    return Columns(prompt, _usual(kind.further, others), target, system=_usual(SYSTEM, others) if kind.system else None)


def _usual(usual: Sequence[str], names: Collection[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _check_together(format: str | None, named: Collection[str]) -> None:
    if format is not None and format not in FORMATS:
        raise SettingsError(f"data.format '{format}' is unknown; {nearest(format, FORMATS)}")
    whole = sorted({"data.messages", "data.text"} & set(named))
    if whole and len(named) > 1:
        raise SettingsError(
            f"{' and '.join(sorted(named))} are set, but {whole[0]} holds prompt and target; remove the other"
        )
    if format is None or not named:
        return
    settings = FORMATS[format].setting
    if wrong := sorted(set(named) - {*settings.split(" and ")}):
        raise SettingsError(f"{wrong[0]} does not fit data.format {format}; set {settings}")


OF_CHATS = ("tools", "functions", "documents", "history")
"""What other trainers put into a chat's prompt, in their own ways."""


def leftovers(row: Row, columns: Columns, parts: Collection[str], setting: str, tools: bool) -> Iterator[DataError]:
    """Yield a problem for each unread column among `parts` or OF_CHATS; `setting` names columns in its place.

    `tools` are read or not. A column is read, too, if the columns in use have its texts, as a prompt beside the chat
    that it begins; or if it has theirs, as a text of the whole row.
    """
    used = (columns.text, columns.text_pair, columns.label, columns.system)
    for name, value in row.cells.items():
        usual = name.strip().lower()
        if name in used or is_missing(value) or value in ([], {}) or (tools and name == "tools"):
            continue
        # A single text is a mark of its document, as in other tables.
        of_chats = usual in OF_CHATS and (isinstance(value, list) or usual not in ("functions", "documents"))
        own, read = [*_texts(value)], [text for column in used if column for text in _texts(row.cells.get(column))]
        repeated = all(any(a in b for b in read) for a in own) or all(any(b in a for a in own) for b in read)
        if of_chats or (usual in parts and usual not in OF_CHATS and not repeated):
            cure = f"set {setting}, " if setting and not of_chats else ""
            yield DataError(
                f"{row.place}: column '{name}' is not read beside '{columns.text}', so a model would not learn it; "
                f"{cure}move it into the text, or remove it"
            )


def _texts(value: Any) -> Iterator[str]:
    """The texts in a cell, with single spaces; of messages without roles."""
    if isinstance(value, Mapping):
        value = [inner for key, inner in value.items() if key not in ("role", "from")]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    elif not is_missing(value):
        yield " ".join(str(value).split())
