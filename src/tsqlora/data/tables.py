"""Rows of tables: CSV, TSV and Parquet."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.utf8 import read_utf8
from tsqlora.errors import DataError


def read_csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Each record with the number of the line it starts on; every cell is text.

    Raises DataError with file and line for broken quotes and for a wrong number of fields.
    """
    return _read_delimited(path, delimiter=",")


def read_tsv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """As `read_csv`, with tabs between the fields and the same quoting."""
    return _read_delimited(path, delimiter="\t")


def read_parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Each row with its 1-based number. Raises DataError for what is not Parquet."""
    try:
        # Not pq.read_table: it adds columns where a directory above is named like "label=1".
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as exc:
        reason = str(exc).splitlines()[0]
        raise DataError(f"{path} cannot be read as Parquet ({reason}); write the file anew") from exc
    _refuse_duplicates(table.column_names, f"{path}")
    return list(enumerate(table.to_pylist(), start=1))


def _read_delimited(path: Path, *, delimiter: str) -> list[tuple[int, dict[str, Any]]]:
    records = _records(read_utf8(path), path, delimiter=delimiter)
    first, header = next(records, (1, []))
    _refuse_duplicates(header, f"{path}:{first}")
    return [(number, _row(header, fields, f"{path}:{number}")) for number, fields in records]


def _records(text: str, path: Path, *, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the line it starts on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        with _fields_of_any_length():
            for fields in reader:
                if fields:
                    yield start, fields
                start = reader.line_num + 1
    except csv.Error as exc:
        cure = 'put fields in "..." and double the quotes inside'
        raise DataError(f"{path}:{start}: broken record ({exc}); {cure}") from exc


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


def _refuse_duplicates(columns: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{place}: column '{twice[0]}' is there twice; rename one")
