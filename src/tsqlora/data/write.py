"""Write rows to a file, in the format of its extension."""

import csv
import json
import math
import os
import re
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.labels import join_labels
from tsqlora.data.readers import parquet_file
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import parents_of, replacing

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row], *, original: Path | None = None) -> None:
    """Write rows atomically, and make the directory if needed.

    `original` is a Parquet file with as many rows: in Parquet, the output has its columns as they are, and those of
    `rows` after them, or in their place. Raises SettingsError for an extension that is not in WRITERS or a place that
    is not writable, DataError for values that the format cannot hold.
    """
    require_writable(path)
    with _fitting(path), parents_of(path), replacing(path) as unfinished:
        _write(unfinished, path.suffix, rows, original)


def try_rows(path: Path, rows: Sequence[Row], *, original: Path | None = None) -> None:
    """Raise as `write_rows` does, and leave nothing: before work whose result would be lost."""
    require_writable(path)
    with _fitting(path), tempfile.TemporaryDirectory(dir=_folder_of(path)) as folder:
        _write(Path(folder, "rows"), path.suffix, rows, original)


def save_beside(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows that `path` did not take as JSON lines: in a file beside it, else in the temporary directory."""
    beside, elsewhere = (
        folder / f"{path.name}.{os.getpid()}.jsonl" for folder in (path.parent, Path(tempfile.gettempdir()))
    )
    try:
        write_rows(beside, rows)
    except (OSError, SettingsError):
        write_rows(elsewhere, rows)
        return elsewhere
    return beside


def _write(path: Path, suffix: str, rows: Sequence[Row], original: Path | None) -> None:
    if original is None:
        WRITERS[suffix.lower()](path, rows)
        return
    with parquet_file(original) as file:
        table = file.read()
    for name in _names(rows):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, pa.array([row.get(name) for row in rows]))
    # Where datasets lists a file's columns, it reads no others.
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"huggingface"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Raises DataError for values that the format of `path` cannot hold."""
    try:
        yield
    except (ValueError, ArithmeticError, RecursionError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the rows do not fit into {path} ({reason}); write .jsonl") from error


def without_formulas(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], int]:
    """Put a ' before every text that a spreadsheet would run, also in column names; and count them.

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
"""First signs of a formula, also in full width (OWASP, CSV injection)."""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def require_writable(path: Path) -> None:
    """Raises SettingsError if rows cannot be written there, by extension or place."""
    if path.suffix.lower() not in WRITERS:
        raise SettingsError(f"--out {path}: extension '{path.suffix}' is unknown; choices: {', '.join(WRITERS)}")
    require_place(path)


def require_place(path: Path) -> None:
    """Raises SettingsError if a file cannot be written there; missing directories may be."""
    if path.is_dir():
        raise SettingsError(f"--out {path} is a directory; name a file")
    if path.exists() and not path.is_file():
        raise SettingsError(f"--out {path} is a device; name a file")
    try:
        tempfile.TemporaryFile(dir=_folder_of(path)).close()
    except OSError as error:
        raise SettingsError(f"--out {path} cannot be written ({error.strerror}); name another file") from None


def _folder_of(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(folder for folder in Path(os.path.realpath(path)).parents if os.path.lexists(folder))


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    # Half a surrogate pair, which JSON can spell, stays as JSON spells it.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        # Dates and decimals, which a Parquet file may hold, become text.
        file.writelines(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows)


def _write_csv(path: Path, rows: Sequence[Row], *, delimiter: str = ",") -> None:
    rows = joined(rows)
    quoting = csv_quoting(value for row in rows for pair in row.items() for value in pair)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _names(rows), delimiter=delimiter, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)


def joined(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Join lists of labels as the reader splits them.  Raises DataError for other nested values, which no cell holds.

    >>> joined([{"text": "Oh!", "labels": ["joy", "love"]}])
    [{'text': 'Oh!', 'labels': 'joy|love'}]
    """
    flat = [{name: join_labels(value) for name, value in row.items()} for row in rows]
    for number, row in enumerate(flat, start=1):
        for name, value in row.items():
            if isinstance(value, list | tuple | dict):
                raise DataError(
                    f"row {number}, column '{name}': {reprlib.repr(value)} does not fit into a cell of CSV or TSV; "
                    "write .jsonl or .parquet"
                )
    return flat


def csv_quoting(values: Iterable[Any]) -> Any:
    """Quote all if a value has a "\\r": Python before 3.13 leaves it unquoted, and readers end the line there."""
    return csv.QUOTE_ALL if any("\r" in str(value) for value in values) else csv.QUOTE_MINIMAL


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in _names(rows)}), path)


def _names(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
}
