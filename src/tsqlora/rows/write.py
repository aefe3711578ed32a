"""Write rows in the format of a file's extension, or copy a file's rows, with corrections."""

import csv
import json
import math
import os
import re
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.errors import DataError, SettingsError, first_line
from tsqlora.files import parents_of, replacing
from tsqlora.rows.labels import join_labels
from tsqlora.rows.readers import PLAIN, TABLES, Dialect, parquet_file
from tsqlora.rows.rows import names_of
from tsqlora.rows.table import Table

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row], *, original: Path | None = None) -> None:
    """Write rows atomically, and make the directory if needed.

    `original` is a Parquet file with as many rows: in Parquet, the output has its columns as they are, and those of
    `rows` after them, or in their place. Raises SettingsError for an extension that is not in WRITERS or a place that
    is not writable, DataError for values that the format cannot hold.
    """
    require_writable(path)
    with _fitting(path), parents_of(path), replacing(path, private=True) as unfinished:
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
        WRITERS[suffix.lower()](path, rows, names_of(rows))
        return
    with parquet_file(original) as file:
        table = file.read()
    for name in names_of(rows):
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
        raise DataError(f"the rows do not fit into {path} ({first_line(error)}); write .jsonl") from error


def without_formulas(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], int]:
    """Put a ' before every text that a spreadsheet would run, also in column names; and count them.

    >>> without_formulas([{"text": "=1+1", "n": -1, "m": "-1"}])
    ([{'text': "'=1+1", 'n': -1, 'm': '-1'}], 1)
    """
    changed = 0

    def harmless(value: Any) -> Any:
        nonlocal changed
        if not isinstance(value, str) or not _FORMULA.match(value):
            return value
        with suppress(ValueError):
            if math.isfinite(float(value)):
                return value
        changed += 1
        return f"'{value}"

    names = {name: harmless(name) for name in names_of(rows)}
    return [{names[name]: harmless(value) for name, value in row.items()} for row in rows], changed


_FORMULA = re.compile(r"\s*[=+@\-\t\r\uff1d\uff0b\uff20\uff0d]")
"""First signs of a formula, also in full width (OWASP, CSV injection)."""


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


def _write_jsonl(path: Path, rows: Iterable[Row], names: Sequence[str], dialect: Dialect = PLAIN) -> None:
    # Half a surrogate pair, which JSON can spell, stays as JSON spells it.
    with open(path, "w", encoding=dialect.encoding, errors="backslashreplace") as file:
        # Dates and decimals, which a Parquet file may hold, become text.
        file.writelines(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows)


def _write_csv(path: Path, rows: Iterable[Row], names: Sequence[str], dialect: Dialect = PLAIN) -> None:
    delimiter = dialect.delimiter or ","
    with open(path, "w", encoding=dialect.encoding, newline="") as file:
        if dialect.skipped:
            file.write(f"sep={delimiter}\n")
        # Python before 3.13 leaves a "\r" unquoted, and readers end the line there.
        plain, quoted = (
            csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting)
            for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        for row in chain([dict(zip(names, names, strict=True))], joined(rows)):
            fields = [row.get(name) for name in names]
            if dialect.quoting == "literal":
                file.write(delimiter.join("" if field is None else str(field) for field in fields) + "\n")
            else:
                (quoted if any("\r" in str(field) for field in fields) else plain).writerow(fields)


def joined(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Join lists of labels as the reader splits them.  Raises DataError for other nested values, which no cell holds.

    >>> list(joined([{"text": "Oh!", "labels": ["joy", "love"]}]))
    [{'text': 'Oh!', 'labels': 'joy|love'}]
    """
    for number, row in enumerate(rows, start=1):
        flat = {name: join_labels(value) for name, value in row.items()}
        for name, value in flat.items():
            if isinstance(value, list | tuple | dict):
                raise DataError(
                    f"row {number}, column '{name}': {reprlib.repr(value)} does not fit into a cell of CSV or TSV; "
                    "write .jsonl or .parquet"
                )
        yield flat


WRITERS: dict[str, Callable[..., None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, dialect=Dialect(delimiter="\t")),
    ".parquet": lambda path, rows, names: pq.write_table(
        pa.table({name: [row.get(name) for row in rows] for name in names}), path
    ),
}
"""By extension: a function of a new file's path, rows and names of columns."""

Cells = Mapping[int, Mapping[str, Any]]
"""New cells by column, by the places of their rows, from 0."""


def copy_rows(source: Table, out: Path, places: np.ndarray | None = None, cells: Cells | None = None) -> None:
    """Write the rows of a file at these places (ascending, from 0), or all, atomically and with new cells.

    A copy in the file's own format has its encoding, its delimiter and its kind of quotes, or its schema. The cells
    are equal; which of them are quoted, and the digits of numbers (1.50), may change.
    """
    path, new = source.path, cells or {}
    chosen = source if places is None else replace(source, ids=places)
    rows = ({**row.cells, **new.get(row.id, {})} for row in chosen)
    suffix = out.suffix.lower()
    if path is None or path.suffix.lower() != suffix:
        write_rows(out, list(rows))
        return
    with _fitting(out), parents_of(out), replacing(out, private=True) as unfinished:
        if suffix == ".parquet":
            _copy_parquet(chosen, unfinished, new)
        elif suffix == ".json":
            text = json.dumps(list(rows), ensure_ascii=False, indent=2) + "\n"
            unfinished.write_text(text, encoding=source.dialect.encoding, errors="backslashreplace")
        else:
            write = _write_csv if suffix in TABLES else _write_jsonl
            write(unfinished, rows, source.names, source.dialect)


def _copy_parquet(source: Table, out: Path, cells: Cells) -> None:
    """One row group in memory at a time."""
    assert source.path is not None
    start, columns = 0, {name for new in cells.values() for name in new}
    with parquet_file(source.path) as file, pq.ParquetWriter(out, file.schema_arrow) as copy:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            ids = source.ids[slice(*np.searchsorted(source.ids, [start, start + len(table)]))]
            table, start = table.take(ids - start), start + len(table)
            for field in (table.schema.field(name) for name in columns):
                numbers = {name: number for number, name in enumerate(source.class_names.get(field.name, ()))}
                values = table.column(field.name).to_pylist()
                for place, id in enumerate(ids.tolist()):
                    if field.name in (new := cells.get(id, {})):
                        value = new[field.name]
                        many = isinstance(value, list)
                        values[place] = [numbers.get(one, one) for one in value] if many else numbers.get(value, value)
                plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
                made = pa.array(values, type=plain).cast(field.type)
                table = table.set_column(table.schema.get_field_index(field.name), field, made)
            if len(table):
                copy.write_table(table)
