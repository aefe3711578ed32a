"""The file formats: lines, JSON, CSV, TSV and Parquet -> rows, one after the other, each with its number."""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tsqlora.errors import DataError

Records = Iterator[tuple[int, dict[str, Any]]]
"""Numbers of lines or rows, and the rows, read one after the other."""


def utf8_lines(path: Path, *, newline: str) -> Iterator[tuple[str, int]]:
    """Each line with its line end, and how many bytes of the file end with it.

    `newline` is "\\n" where lines end at line feeds alone, "" where they end at any of \\n, \\r
    and \\r\\n.  A byte order mark is counted and left out.  Raises DataError where the file cannot be read,
    and names the line that is not UTF-8.
    """
    try:
        at = bom_length(path)
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            for line in file:
                at += len(line.encode())
                yield line, at
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(_where_not_utf8(path)) from exc


def bom_length(path: Path) -> int:
    """Bytes of the byte order mark at the file's start, 0 if there is none."""
    with open(path, "rb") as file:
        return len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0


def _where_not_utf8(path: Path) -> str:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as exc:
                byte = f"byte 0x{line[exc.start]:02x}"
                return f"{path}:{number}: {byte} is not UTF-8; save the file as UTF-8 text, and not compressed"
    raise AssertionError(f"{path} changed while it was read")


def read_jsonl(path: Path) -> Records:
    """Each line's number and object, one after the other; blank lines are whitespace between them.

    Raises DataError with file and line for what is not JSON or not an object.
    """
    for number, line, _, _ in json_lines(path):
        yield number, _object(_parse(line.rstrip(), path, number), f"{path}:{number}")


def read_json(path: Path) -> Records:
    """As `read_jsonl`, or the elements of one array with their 1-based places in it.

    An array is read whole.
    """
    first = next((line for _, line, _, _ in json_lines(path)), "")
    if not first.lstrip().startswith("["):
        yield from read_jsonl(path)
        return
    text = "".join(line for line, _ in utf8_lines(path, newline="\n"))
    for number, value in enumerate(_parse(text, path, 1), start=1):
        yield number, _object(value, f"{path}:{number}")


def json_lines(path: Path) -> Iterator[tuple[int, str, int, int]]:
    """Each line that is not blank: its number, its text, and where it starts and ends in the file's bytes."""
    # Not str.splitlines: it also cuts at U+2028 and others that JSON allows inside a string.
    for number, (line, end) in enumerate(utf8_lines(path, newline="\n"), start=1):
        if line.strip():
            yield number, line, end - len(line.encode()), end


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
        raise ValueError(f"{twice!r} is there twice in one object")
    return row


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f'{place}: a {kind} where a row must be an object like {{"text": "...", "label": 1}}')
    return value


def read_parquet(path: Path) -> Records:
    """Each row with its 1-based number, one after the other. Raises DataError for what is not Parquet."""
    number = 0
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, open.  Raises DataError for what is not Parquet, also later where it is read."""
    try:
        # Not pq.read_table: it adds columns where a directory above is named like "label=1".
        with pq.ParquetFile(path) as file:
            _refuse_duplicates(file.schema_arrow.names, f"{path}")
            yield file
    except DataError:
        raise
    except Exception as exc:  # no Parquet; text that is not UTF-8, a date that no calendar has, an unknown time zone …
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise DataError(f"{path} cannot be read as Parquet ({reason}); export it again") from exc


def read_delimited(path: Path, *, delimiter: str) -> Records:
    """Each record of a CSV or TSV file with the number of the line it starts on, one after the other; cells are text.

    Raises DataError with file and line for broken quotes and for a wrong number of fields.
    """
    found = records(path, delimiter=delimiter)
    first, header, _, _ = next(found, (1, [], 0, 0))
    _refuse_duplicates(header, f"{path}:{first}")
    for number, fields, _, _ in found:
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields where the header names {len(header)} ({', '.join(header)}); "
                'put a field that holds the separator in "..."'
            )
        yield number, dict(zip(header, fields, strict=True))


def records(path: Path, *, delimiter: str) -> Iterator[tuple[int, list[str], int, int]]:
    """Each record that is not blank, the header first: the line it starts on, its fields, and where
    it starts and ends in the file's bytes.
    """
    line, start, end = 1, 0, 0

    def lines() -> Iterator[str]:
        nonlocal end
        for text, end in utf8_lines(path, newline=""):  # noqa: B007  (read below, after each record)
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        with _fields_of_any_length():
            for fields in reader:
                if fields:
                    yield line, fields, start, end
                line, start = reader.line_num + 1, end
    except csv.Error as exc:
        cure = 'put fields in "..." and double the quotes inside'
        raise DataError(f"{path}:{line}: broken record ({exc}); {cure}") from exc


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
        raise DataError(f"{place}: column '{twice[0]}' is there twice; rename one")


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
    ".parquet": read_parquet,
}

# Formats whose cells are all text, whatever they stand for.
UNTYPED = (".csv", ".tsv")
