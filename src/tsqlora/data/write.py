"""Rows -> a file, in the format that its extension names; or some rows of a file, copied as they stand."""

import csv
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.dialect import Dialect
from tsqlora.data.readers import json_lines, parquet_file, records
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import parents_of, replacing

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows whole or not at all; the directory is made if need be.

    Raises SettingsError for an extension that is not in WRITERS or a place that cannot be
    written, DataError for values that the format cannot hold.
    """
    require_writable(path)
    try:
        with parents_of(path), replacing(path) as unfinished:
            WRITERS[path.suffix.lower()](unfinished, rows)
    except (ValueError, ArithmeticError, RecursionError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the rows do not fit into {path} ({reason}); write .jsonl") from error


SHEETS = (".csv", ".tsv")
"""What people open in spreadsheets, which run what looks like a formula."""


def without_formulas(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], int]:
    """The rows with a ' before every text that a spreadsheet would run, names of columns too; how many got one.

    >>> without_formulas([{"text": "=1+1", "n": -1, "m": "-1"}])
    ([{'text': "'=1+1", 'n': -1, 'm': '-1'}], 1)
    """
    changed = 0

    def harmless(value: Any) -> Any:
        nonlocal changed
        if not isinstance(value, str) or not _FORMULA.match(value) or _is_number(value):
            return value
        changed += 1
        return f"'{value}"

    names = {name: harmless(name) for name in _names(rows)}
    return [{names[name]: harmless(value) for name, value in row.items()} for row in rows], changed


_FORMULA = re.compile(r"\s*[=+@\-\t\r\uff1d\uff0b\uff20\uff0d]")
"""The signs with which formulas begin, also as wide as a Chinese character (OWASP, CSV injection)."""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def require_writable(path: Path) -> None:
    """Raises SettingsError for an extension or a place in which rows cannot be written."""
    if path.suffix.lower() not in WRITERS:
        raise SettingsError(f"--out {path}: unknown extension '{path.suffix}'; known: {', '.join(WRITERS)}")
    require_place(path)


def require_place(path: Path) -> None:
    """Raises SettingsError where a file cannot be written; what is missing of its directory is made when it is."""
    if path.is_dir():
        raise SettingsError(f"--out {path} is a directory; name a file")
    try:
        there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise SettingsError(f"--out {path} cannot be written ({error.strerror}); name another file") from None


def require_apart(out: Path, *read: str | Path | None) -> None:
    """Raises SettingsError where a file that is read would be replaced by what is made of it."""
    for path in read:
        if path is not None and os.path.exists(path) and out.exists() and os.path.samefile(path, out):
            raise SettingsError(f"--out {out} is the file that is read, and would be replaced; name another file")


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    # Half a surrogate pair, which JSON can spell, is written as JSON spells it.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        # Dates and decimals, which a Parquet file may hold, become text.
        file.writelines(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows)


def _write_csv(path: Path, rows: Sequence[Row], *, delimiter: str = ",") -> None:
    # Python before 3.13 leaves a lone "\r" unquoted, and a reader takes it for the end of a line.
    returns = any("\r" in str(value) for row in rows for pair in row.items() for value in pair)
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _names(rows), delimiter=delimiter, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in _names(rows)}), path)


def _names(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
}


Span = tuple[int, int]
"""Where something starts and ends in a file's bytes."""


def can_copy(source: Path, out: Path) -> bool:
    """Whether both are of one format whose rows can be copied as they stand."""
    return source.suffix.lower() == out.suffix.lower() and out.suffix.lower() in COPIERS


def copy_rows(source: Path, out: Path, places: np.ndarray, dialect: Dialect) -> None:
    """Writes the rows at these places (ascending, counted from 0) whole or not at all.

    Encoding, delimiter, header, byte order mark, quoting and line ends are the source's; blank lines are left out.
    """
    with parents_of(out), replacing(out) as unfinished:
        COPIERS[source.suffix.lower()](source, unfinished, places, dialect)


def _copy_spans(
    source: Path, out: Path, places: np.ndarray, dialect: Dialect, *, spans: Callable[[Path, Dialect], Iterator[Span]]
) -> None:
    """`spans` gives what stands before the rows first, then each row."""
    found = spans(source, dialect)
    with open(source, "rb") as file, open(out, "wb") as copy:
        for start, end in chain([next(found)], _at(found, places)):
            file.seek(start)
            copy.write(file.read(end - start))


def _at(spans: Iterator[Span], places: np.ndarray) -> Iterator[Span]:
    before = 0
    for place in places.tolist():
        yield next(islice(spans, place - before, None))
        before = place + 1


def _json_spans(path: Path, dialect: Dialect) -> Iterator[Span]:
    yield 0, dialect.mark
    for _, _, start, end in json_lines(path, dialect):
        yield start, end


def _record_spans(path: Path, dialect: Dialect) -> Iterator[Span]:
    found = records(path, dialect)
    _, _, _, end = next(found)
    yield 0, end
    for _, _, start, end in found:
        yield start, end


def _copy_parquet(source: Path, out: Path, places: np.ndarray, _: Dialect) -> None:
    """A row group at a time: so many rows are in memory."""
    before = 0
    with parquet_file(source) as file, pq.ParquetWriter(out, file.schema_arrow) as copy:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            here = places[(places >= before) & (places < before + rows)] - before
            if len(here):
                copy.write_table(file.read_row_group(group).take(here))
            before += rows


COPIERS: dict[str, Callable[[Path, Path, np.ndarray, Dialect], None]] = {
    ".jsonl": partial(_copy_spans, spans=_json_spans),
    ".csv": partial(_copy_spans, spans=_record_spans),
    ".tsv": partial(_copy_spans, spans=_record_spans),
    ".parquet": _copy_parquet,
}
