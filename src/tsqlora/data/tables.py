"""Rows of tables: CSV, TSV and Parquet."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.utf8 import utf8_lines
from tsqlora.errors import DataError

_PARQUET_BATCH = 1024
"""Rows that are in memory at a time, where rows are read one after the other."""


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its 1-based number, one after the other. Raises DataError for what is not Parquet."""
    number = 0
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for row in _values(batch, path):
                number += 1
                yield number, row


def _values(batch: pa.RecordBatch, path: Path) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except Exception as exc:  # text that is not UTF-8, a date that no calendar has, an unknown time zone …
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise DataError(f"{path} has a value that cannot be read ({reason}); write the file anew") from exc


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, open.  Raises DataError for what is not Parquet, also later where it is read."""
    try:
        # Not pq.read_table: it adds columns where a directory above is named like "label=1".
        with pq.ParquetFile(path) as file:
            _refuse_duplicates(file.schema_arrow.names, f"{path}")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        reason = str(exc).splitlines()[0]
        raise DataError(f"{path} cannot be read as Parquet ({reason}); write the file anew") from exc


def read_delimited(path: Path, *, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record of a CSV or TSV file with the number of the line it starts on, one after the other; cells are text.

    Raises DataError with file and line for broken quotes and for a wrong number of fields.
    """
    found = records(path, delimiter=delimiter)
    first, header, _, _ = next(found, (1, [], 0, 0))
    _refuse_other_separator(header, delimiter, f"{path}:{first}")
    _refuse_duplicates(header, f"{path}:{first}")
    for number, fields, _, _ in found:
        yield number, _row(header, fields, f"{path}:{number}")


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


def _row(header: Sequence[str], fields: Sequence[str], place: str) -> dict[str, Any]:
    if len(fields) != len(header):
        columns = ", ".join(header)
        raise DataError(
            f"{place}: {len(fields)} fields where the header names {len(header)} ({columns}); "
            f'put a field that holds the separator in "..."'
        )
    return dict(zip(header, fields, strict=True))


def _refuse_other_separator(header: Sequence[str], delimiter: str, place: str) -> None:
    """Spreadsheets write .csv with semicolons where the comma is the decimal point."""
    other = next((sign for sign in ",\t;|" if sign != delimiter and len(header) == 1 and sign in header[0]), None)
    if other is not None:
        raise DataError(
            f"{place}: columns seem to be separated by {other!r} ({header[0]}); "
            "save the file with commas (.csv) or tabs (.tsv) between them"
        )


def _refuse_duplicates(columns: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{place}: column '{twice[0]}' is there twice; rename one")
