"""File formats: JSON lines, JSON, CSV, TSV and Parquet, read row by row with line or row numbers."""

import csv
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tsqlora.data.dialect import Dialect
from tsqlora.errors import DataError
from tsqlora.files import reading

Records = Iterator[tuple[int | str, dict[str, Any]]]
"""Line or row numbers, or names of files, with rows."""


def read_jsonl(path: Path, dialect: Dialect) -> Records:
    """Each line's number and object; blank lines are skipped.  Raises DataError with file and line."""
    for number, line, _, _ in json_lines(path, dialect):
        yield number, _object(_parse(line.rstrip(), path, number), f"{path}:{number}")


def read_json(path: Path, dialect: Dialect) -> Records:
    """As `read_jsonl`; or the elements of one array, which is read whole, numbered from 1."""
    if not is_array(path, dialect):
        yield from read_jsonl(path, dialect)
        return
    text = "".join(line for line, _ in dialect.lines(path, newline="\n"))
    for number, value in enumerate(_parse(text, path, 1), start=1):
        yield number, _object(value, f"{path}:{number}")


def is_array(path: Path, dialect: Dialect) -> bool:
    """Whether a .json file holds one array instead of lines."""
    first = next((line for _, line, _, _ in json_lines(path, dialect)), "")
    return path.suffix.lower() == ".json" and first.lstrip().startswith("[")


def json_lines(path: Path, dialect: Dialect) -> Iterator[tuple[int, str, int, int]]:
    """Each line that is not blank: its number, its text, and its start and end in bytes."""
    # Not str.splitlines: it also splits at U+2028 and others that JSON allows inside a string.
    for number, (line, end) in enumerate(dialect.lines(path, newline="\n"), start=1):
        if line.strip():
            yield number, line, end - len(line.encode(dialect.encoding)), end


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, json.JSONDecodeError):
            line += exc.lineno - 1
        raise DataError(f"{path}:{line}: not JSON ({exc}); write one object a line, or an array of them") from exc


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return row


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f'{place}: a {kind} where a row must be an object like {{"text": "...", "label": 1}}')
    return value


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.  Raises DataError for other files, also while it is read."""
    reading(path)
    try:
        # Not pq.read_table: a parent directory named like "label=1" would add a column.
        with pq.ParquetFile(path) as file:
            _refuse_duplicates(file.schema_arrow.names, f"{path}")
            yield file
    except DataError:
        raise
    except Exception as exc:  # not Parquet, text that is not UTF-8, an impossible date, an unknown time zone …
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise DataError(f"{path} cannot be read as Parquet ({reason}); export it again") from exc


def read_delimited(path: Path, dialect: Dialect) -> Records:
    """Each record of a CSV or TSV file with the number of its first line; cells are text.

    Several columns may have no name if they are empty, as where a spreadsheet ends each line with ";;".
    Raises DataError with file and line for broken quotes and for a wrong number of fields.
    """
    rows = records(path, dialect)
    first, header, _, _ = next(rows, (1, [], 0, 0))
    _refuse_duplicates([name for name in header if name], f"{path}:{first}")
    unnamed = [place for place, name in enumerate(header) if not name]
    for number, fields, _, _ in rows:
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
                'put a field that holds the separator in "..."'
            )
        if len(unnamed) > 1 and any(fields[place] for place in unnamed):
            raise DataError(f"{path}:{number}: a value in one of {len(unnamed)} columns without a name; name them")
        yield number, dict(zip(header, fields, strict=True))


def records(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str], int, int]]:
    """Each record that is not blank, header first: its first line, its fields, and its start and end in bytes.

    Raises DataError for broken quotes. A warning names the first lines that a quote joins, though each could be a
    row.
    """
    line, start, end, width, doubted = 1, 0, 0, None, False
    delimiter, separators = dialect.delimiter or ",", list[int]()

    def lines() -> Iterator[str]:
        nonlocal end
        for text, end in dialect.lines(path, newline=""):  # noqa: B007  (read below, after each record)
            separators.append(text.count(delimiter))
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        with _fields_of_any_length():
            for fields in reader:
                if fields:
                    width = len(fields) - 1 if width is None else width
                    joined = len(separators) > 1 or len(fields) - 1 != width
                    if joined and not doubted and width and set(separators) == {width}:
                        _doubt_quotes(f"{path}:{line}", reader.line_num - line)
                        doubted = True
                    yield line, fields, start, end
                line, start = reader.line_num + 1, end
                separators.clear()
    except csv.Error as exc:
        cure = 'put fields in "..." and double the quotes inside'
        raise DataError(f"{path}:{line}: broken record ({exc}); {cure}") from exc


def _doubt_quotes(place: str, further: int) -> None:
    """Raise or warn where a quote changes fields that the separators alone would give; it joins so many more lines."""
    joins = f"joins {further + 1} lines that could each be a row" if further else "hides a separator"
    text = f"{place}: a quote {joins}; if it belongs to the text, double it and put its field in quotes"
    if not further:
        raise DataError(text)
    warnings.warn(text, stacklevel=3)


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    # The csv module's limit of 131,072 characters is shorter than some documents.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _refuse_duplicates(columns: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{place}: two columns are named '{twice[0]}'; rename one")


READERS: dict[str, Callable[[Path, Dialect], Records]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
}
"""Readers of text files; `parquet_file` is that of Parquet."""
SUFFIXES = (*READERS, ".parquet")
