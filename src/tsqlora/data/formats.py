"""Row formats for text generation: detect a file's format, and read its rows."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from shlex import quote
from typing import Any

from tsqlora.data.examples import (
    PAIRS,
    Chat,
    Example,
    Manner,
    Problems,
    read_alpaca,
    read_chat,
    read_document,
    read_pair,
    read_prompt,
    read_text,
)
from tsqlora.data.rows import USUAL_PAIR, USUAL_TEXT, Columns, Row, find_columns, is_missing, named_columns, quoted
from tsqlora.errors import DataError, SettingsError, nearest


@dataclass(frozen=True, slots=True)
class Kind:
    """A row format: a reader, and the usual names of its columns.

    Args:
        read: read a row, with these columns, for a model of this manner.
        usual: pairs of prompt and target; the target is None if one column holds both.
        further: names for a second part of the prompt, which is optional.
        setting: the setting that names the column, if one column holds both.
        system: whether a system prompt may stand in another column.
    """

    read: Callable[[Row, Columns, Manner, Problems], Example | Chat]
    usual: tuple[tuple[str, str | None], ...]
    further: tuple[str, ...] = ()
    setting: str = "data.prompt"
    system: bool = True

    @property
    def whole(self) -> bool:
        """Whether one column holds prompt and target."""
        return self.setting != "data.prompt"


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

    def read(self, row: Row, manner: Manner) -> Example | Chat:
        """A row as prompt and target.  Raises DataError if it is not whole, or the model would not read all of it."""
        example, problems = self.parse(row, manner)
        if problems:
            raise problems[0]
        return example

    def parse(self, row: Row, manner: Manner) -> tuple[Example | Chat, Problems]:
        """What can be read of a row, and why it cannot be trained on, such as an unread column in PARTS."""
        read, problems = read_pair if self.name == PREFERENCE else FORMATS[self.name].read, Problems()
        example = read(row, self.columns, manner, problems)
        parts = PARTS if manner.targets else PARTS - ANSWERS
        cure = None if self.name == PREFERENCE else _naming(FORMATS[self.name])
        tools = isinstance(example, Chat) and bool(example.tools)
        problems += leftovers(row, self.columns, parts if self.whole else (), cure, tools=tools)
        return example, problems

    def ends_unanswered(self, row: Row) -> bool:
        """Whether a chat goes on behind its last answer."""
        if not isinstance(row.cells.get(self.columns.text), list):
            return False
        example, _ = self.parse(row, Manner(seq2seq=False, chat=True))
        return isinstance(example, Chat) and bool(example.messages and example.unanswered)

    @property
    def sides(self) -> tuple["Format", ...]:
        """The format of each answer: of a pair, of the chosen and of the rejected one."""
        if self.name != PREFERENCE:
            return (self,)
        columns = self.columns
        return self, replace(self, columns=replace(columns, text_pair=columns.label, label=columns.text_pair))


def pair_format(names: Sequence[str], *, source: str) -> Format:
    """The format of preference rows.  Raises DataError without chosen or rejected answers."""
    if missing := [name for name in ("chosen", "rejected") if name not in names]:
        raise DataError(
            f"{source} has no column '{missing[0]}'; preference rows have prompt, chosen and rejected, and its columns "
            f"are {', '.join(names)}"
        )
    prompt = next((name for name in ("prompt", "question", "instruction", "input") if name in names), PAIRS.text)
    return Format(PREFERENCE, replace(PAIRS, text=prompt, system=_first(SYSTEM, names)))


def format_of(names: Sequence[str], source: str, **named: str | None) -> Format:
    """Find the format by the columns, or by `named` ones.  Raises DataError if no format of texts fits."""
    if {"chosen", "rejected"} <= {*names} and not any(named.values()):
        return pair_format(names, source=source)
    return find_format(names, source=source, **named)


def unlabelled_format(names: Sequence[str], source: str) -> Format | None:
    """The format of texts without labels by their columns; None for labelled rows, and for others."""
    try:
        if find_columns(names, source=source).label is not None:
            return None
    except DataError:
        pass  # no column of a text to classify
    try:
        return format_of(names, source)
    except DataError:
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
        usual = (name for name in fitting if (whole, None) in FORMATS[name].usual)
        name = format or next(usual, fitting[0])
        return Format(name, _columns(FORMATS[name], whole, None, names), whole=False)
    all_named = prompt is not None and target is not None
    kinds = FORMATS if format is None else {format: FORMATS[format]}
    # Two usual columns win over a named column beside a usual one.
    for both in (True, False):
        for name, kind in kinds.items():
            for pair in kind.usual:
                if _fits(pair, prompt, target, names, both=both):
                    columns = _columns(kind, prompt or pair[0], target or pair[1], names)
                    return Format(name, columns, whole=not all_named)
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
        columns = _columns(FORMATS["prompt"], prompt, target, names)
        return Format("prompt", replace(columns, text_pair=None), whole=False)
    return Format(format, _columns(FORMATS[format], prompt, target, names), whole=False)


def _fits(
    usual: tuple[str, str | None], prompt: str | None, target: str | None, names: Collection[str], *, both: bool
) -> bool:
    """Whether both columns have usual names, or with `both` false one of them while a setting names the other."""
    first, second = usual
    if second is None:
        return both and not (prompt or target) and first in names
    if both:
        return (prompt or first) == first and (target or second) == second and {first, second} <= {*names}
    return (prompt is None) != (target is None) and (first if prompt is None else second) in names


def _columns(kind: Kind, prompt: str, target: str | None, names: Collection[str]) -> Columns:
    others = [name for name in names if name not in (prompt, target)]
    return Columns(prompt, _first(kind.further, others), target, system=_first(SYSTEM, others) if kind.system else None)


def _first(usual: Sequence[str], names: Collection[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _naming(kind: Kind) -> str:
    """The settings that name all columns of a format."""
    return kind.setting if kind.whole else "data.prompt and data.target"


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
    settings = _naming(FORMATS[format])
    if wrong := sorted(set(named) - {*settings.split(" and ")}):
        raise SettingsError(f"{wrong[0]} does not fit data.format {format}; set {settings}")


OF_CHATS = ("tools", "functions", "documents", "history")
"""What other trainers put into a chat's prompt, in their own ways."""


def leftovers(
    row: Row, columns: Columns, parts: Collection[str], setting: str | None, *, tools: bool
) -> Iterator[DataError]:
    """Yield a problem for each unread column among `parts` or OF_CHATS; `setting` names columns in its place.

    `tools` are read or not.

    A column is read, too, if the columns in use have its texts, as a prompt beside the chat that it begins; or if it
    has theirs, as a text of the whole row.
    """
    used = (columns.text, columns.text_pair, columns.label, columns.system)
    read = [row.cells.get(column) for column in used if column is not None]
    for name, value in row.cells.items():
        usual = name.strip().lower()
        if name in used or is_missing(value) or value in ([], {}) or (tools and name == "tools"):
            continue
        if usual in OF_CHATS:
            # A single text is a mark of its document, as in other tables.
            if usual in ("functions", "documents") and not isinstance(value, list):
                continue
            cure = ""
        elif usual in parts and not _is_repeated(value, read):
            cure = "" if setting is None else f"set {setting}, "
        else:
            continue
        yield DataError(
            f"{row.place}: column '{name}' is not read beside '{columns.text}', so a model would not learn it; "
            f"{cure}move it into the text, or remove it"
        )


def _is_repeated(value: Any, cells: Collection[Any]) -> bool:
    own, read = [*_texts(value)], [text for cell in cells for text in _texts(cell)]
    within = all(any(text in other for other in read) for text in own)
    return within or all(any(text in other for other in own) for text in read)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a cell, with single spaces; of messages without roles."""
    if isinstance(value, Mapping):
        value = [inner for key, inner in value.items() if key not in ("role", "from")]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    elif not is_missing(value):
        yield " ".join(str(value).split())
