"""Rows of a table: which columns they have, their cells, and the hash that identifies each."""

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tsqlora.errors import DataError, nearest, printable

ENDINGS: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".au"),
}
"""File endings of each kind of media."""
USUAL_TEXT = ("text", "sentence", "sentence1", "premise", "question", "question1", "content", "review", "document")

# A pair counts only beside its usual partner: a lone "answer" may be anything.
# "sentence" with "question" is QNLI, where neither alone decides the label.
USUAL_PAIR = {
    "text": "text_pair",
    "sentence": "question",
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question": "answer",
    "question1": "question2",
}

USUAL_TOKENS = ("tokens", "words")
USUAL_TAGS = ("tags", "ner_tags", "labels")
USUAL_PATHS = ("path", "file", "file_name", "filename", "file_path", "filepath")
_LONGEST_NAME = 40
"""Characters of a column's name in a message."""
USUAL_LABEL = ("label", "labels", "target", "class", "category", "score")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns in use; None for one that the data lacks.

    `media` is "image" or "audio" where `text` is a column of paths; `system` holds the system prompts of texts to
    generate. With `one_hot` the label of a row is the names of those columns that hold a 1.
    """

    text: str
    text_pair: str | None
    label: str | None
    media: str | None = field(default=None, repr=False)
    system: str | None = field(default=None, repr=False)
    one_hot: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "one_hot", tuple(self.one_hot))  # a list where JSON held it

    def spelled(self, names: Collection[str]) -> "Columns":
        """The columns as a file spells them, where one of its own differs in case or in blanks alone.

        >>> Columns("text", None, "label").spelled([" Text", "label"])
        Columns(text=' Text', text_pair=None, label='label')
        """
        pair, label, system = (
            None if name is None else _spelled(name, names) for name in (self.text_pair, self.label, self.system)
        )
        one_hot = tuple(_spelled(name, names) for name in self.one_hot)
        return Columns(_spelled(self.text, names), pair, label, self.media, system, one_hot)


def _spelled(name: str, names: Collection[str]) -> str:
    alike = [column for column in names if column.strip().lower() == name.strip().lower()]
    return name if name in names or len(alike) != 1 else alike[0]


def find_columns(
    names: Sequence[str],
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    source: str,
    tokens: bool = False,
    media: str | None = None,
) -> Columns:
    """Choose the columns: those that settings name, else the first usual name in the file; of `tokens` with tags.

    With `media`, "image" or "audio", the text is a path.

    A pair is detected only if `text` is not set: setting the text alone means one text.
    Raises DataError for a column that is missing or serves twice, and if there is no text column.

    >>> find_columns(["premise", "hypothesis"], text=None, text_pair=None, label=None, source="a.csv")
    Columns(text='premise', text_pair='hypothesis', label=None)
    >>> find_columns(["Id", "Text", "Label"], text=None, text_pair=None, label=None, source="b.csv")
    Columns(text='Text', text_pair=None, label='Label')
    """
    text, text_pair, label = named_columns(
        {"data.text": text, "data.text_pair": text_pair, "data.label": label}, names, source
    )
    usual = (media, *USUAL_PATHS) if media else USUAL_TOKENS if tokens else USUAL_TEXT
    first_text = text or _first(usual, _without(names, text_pair, label))
    if first_text is None:
        what = f"column of {media} files" if media else "column of tokens" if tokens else "text column"
        other = next((kind for kind in ENDINGS if kind in names and kind != media), None)
        cure = f", or task.type to {other}-classification" if other else ""
        # A number, or longer than names are: the cells of a first row.
        cells = any(len(name) > _LONGEST_NAME or re.fullmatch(r"\s*-?\d+([.,]\d+)?\s*", name) for name in names)
        doubt = "is the line with the names of the columns missing? else " if cells else ""
        raise NoColumnError(
            f"{source} has no {what}; {doubt}set data.text to one of its columns: {quoted(names)}{cure}"
        )
    if text is None and text_pair is None and not tokens and not media:
        usual_pair = USUAL_PAIR.get(first_text.strip().lower())
        text_pair = usual_pair and _first((usual_pair,), _without(names, label))
    label = label or _first(USUAL_TAGS if tokens else USUAL_LABEL, _without(names, first_text, text_pair))
    return Columns(first_text, text_pair, label, media)


def one_hot_columns(rows: Iterable[Mapping[str, Any]], used: Columns, names: Iterable[str]) -> list[str]:
    """Columns beside the text that hold zeros and ones alone, each of which is a label; none if there is only one.

    >>> rows = [{"text": "a", "id": 7, "joy": 0, "love": 1.0}, {"text": "b", "id": 8, "joy": 1, "love": 0.0}]
    >>> one_hot_columns(rows, Columns("text", None, None), rows[0])
    ['joy', 'love']
    """
    ones = dict.fromkeys((name for name in names if name not in (used.text, used.text_pair)), False)
    for row in rows:
        for name in [*ones]:
            if (one := is_one(row.get(name))) is None:
                del ones[name]
            elif one:
                ones[name] = True
    labels = [name for name, any_one in ones.items() if any_one]
    return labels if len(labels) > 1 else []


def is_one(cell: Any) -> bool | None:
    """Whether a cell of zeros and ones holds a 1, also as text, as true, or empty for 0; None for any other cell."""
    text = "" if is_missing(cell) else str(cell).strip().lower().removesuffix(".0")
    return {"": False, "0": False, "false": False, "1": True, "true": True}.get(text)


def named_columns(settings: Mapping[str, str | None], names: Sequence[str], source: str) -> list[str | None]:
    """The columns that settings name, as the file spells them.

    A column that differs in its case or in blanks around it serves, if it is the only one.
    Raises DataError for a setting that names a missing column, or the column of another setting.

    >>> named_columns({"data.text": "body", "data.label": None}, [" Body ", "label"], "a.csv")
    [' Body ', None]
    """
    used = dict[str, str]()
    for key, name in settings.items():
        if name is None:
            continue
        column = _spelled(name, names)
        if column not in names:
            raise DataError(f"{source} has no column '{name}', which {key} names; {nearest(name, names)}")
        other = next((other for other, taken in used.items() if taken == column), None)
        if other:
            raise DataError(f"{other} and {key} both name column '{column}' of {source}; name two columns")
        used[key] = column
    return [used.get(key) for key in settings]


def names_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every column that some row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def quoted(names: Iterable[str]) -> str:
    """Names of columns for a message, in quotes: a name may have blanks around it, or be empty."""
    return ", ".join(f"'{printable(name, _LONGEST_NAME)}'" for name in names if name.strip())


def _first(usual: Sequence[str], names: Collection[str]) -> str | None:
    """The first usual name among `names`; "Text" and " text " serve if there is no "text"."""
    spelled = {name.strip().lower(): name for name in reversed([*names])} | {name: name for name in names}
    return next((spelled[name] for name in usual if name in spelled), None)


def _without(names: Sequence[str], *taken: str | None) -> list[str]:
    return [name for name in names if name not in taken]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Args:
        cells: its values by column.
        source: the name of its table.
        number: its line or row there, from 1, or its file.
        id: its place in the table's file, from 0.
    """

    cells: dict[str, Any]
    source: str
    number: int | str
    id: int

    @property
    def place(self) -> str:
        """File and line, for errors: `train.jsonl:17`."""
        return f"{self.source}:{self.number}"


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, or white space."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


class NotTextError(DataError):
    """A value of another type where a text must be."""


class MissingError(DataError):
    """A row without a required value; `what` names the value without the row's place."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(place, what)  # what an error between processes is made of again
        self.what = what

    def __str__(self) -> str:
        return printable(f"{self.args[0]}: {self.what}; fill it in or remove the row")


class NoColumnError(DataError):
    """A table without a column that no setting names."""


def lacking(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The first missing value of a row, in words; None if it has all. `columns` maps names to what they hold."""
    missing = next((column for column in columns if is_missing(row.get(column))), None)
    return None if missing is None else f"no {columns[missing]} in column '{missing}'"


def text_at(row: Row, column: str) -> str:
    """The text in a column.  Raises MissingError with file and row if it is empty."""
    value = row.cells.get(column)
    if is_missing(value):
        raise MissingError(row.place, f"no text in column '{column}'")
    return as_text(value, f"column '{column}'", row.place)


def tokens_at(row: Row, column: str) -> list[str]:
    """The tokens of a row.  Raises MissingError with file and row if there are none, DataError if they are no list."""
    value = row.cells.get(column)
    if is_missing(value) or value == []:
        raise MissingError(row.place, f"no tokens in column '{column}'")
    if not isinstance(value, list):
        raise DataError(
            f"{row.place}: column '{column}' holds {reprlib.repr(value)}, not a list of tokens; write lists, in JSON "
            "lines or Parquet"
        )
    return [as_text(token, f"column '{column}'", row.place) for token in value]


def as_text(value: Any, where: str, place: str) -> str:
    """The value itself.  Raises DataError with its place if it is not text, or text that UTF-8 cannot encode."""
    if not isinstance(value, str):
        raise NotTextError(f"{place}: {where} holds {reprlib.repr(value)}, not text; write a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: {where} holds half a surrogate pair (\\ud800..\\udfff); remove it") from None
    return value


def row_text(cells: Mapping[str, Any], columns: Columns) -> str:
    """The system prompt, text and second text of a row, a line each; of a chat, a line a message; tokens with spaces.

    >>> row_text({"q": "Why?", "chat": [{"role": "user", "content": "Hi."}]}, Columns("q", "chat", None))
    'Why?\\nuser: Hi.'
    >>> parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}]
    >>> row_text({"chat": [{"role": "user", "content": parts}]}, Columns("chat", None, None))
    'user: Hi.'
    """

    def part(value: Any) -> str:
        parts = isinstance(value, list) and all(isinstance(one, dict) for one in value)
        return "".join(str(one.get("text", one)) for one in value) if parts else str(value)

    def text(cell: Any) -> str:
        if not isinstance(cell, list):
            return str(cell)
        if all(isinstance(item, str) for item in cell):
            return " ".join(cell)
        return "\n".join(": ".join(map(part, one.values())) if isinstance(one, dict) else str(one) for one in cell)

    used = (cells.get(name) for name in (columns.system, columns.text, columns.text_pair) if name is not None)
    return "\n".join(text(cell) for cell in used if cell is not None)


def sample_hash(text: str, pair: str, label: str) -> str:
    """First 16 hex digits of the SHA-256 of text, pair and label, joined by U+001F."""
    return hashlib.sha256(f"{text}\x1f{pair}\x1f{label}".encode()).hexdigest()[:16]


def row_hash(cells: Mapping[str, Any], columns: Columns) -> str:
    """`sample_hash` of a row's text, second text and label; a missing one counts as empty.

    The label counts as the row writes it: its class id would change with the other classes. Of a file its content
    counts.
    """
    values = [None if c is None else cells.get(c) for c in (columns.text, columns.text_pair, columns.label)]
    if columns.media:
        values[0] = content_hash(str(values[0]))
    # Lists (chats) as JSON with sorted keys: Parquet may change the order of keys.
    written = (
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
        if isinstance(value, list | dict)
        else ""
        if value is None
        else str(value)
        for value in values
    )
    return sample_hash(*written)


def content_hash(path: str) -> str:
    """16 hex digits that identify a file's content; "" for a file that cannot be read."""
    try:
        about = os.stat(path)
        return _content_hash(path, about.st_mtime_ns, about.st_size)
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=1 << 16)  # a row is hashed for its split, for twins in other splits, and for its sample
def _content_hash(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
