"""Write rows in the format of a file's extension, or copy a file's rows byte by byte."""

import csv
import io
import json
import math
import os
import re
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.labels import join_labels
from tsqlora.data.readers import TABLES, Dialect, is_array, json_lines, parquet_file, records, rows_in
from tsqlora.data.table import Table
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


COPIED = (".jsonl", ".parquet", *TABLES)
"""Formats whose rows can be copied as they stand."""

Cells = Mapping[int, Mapping[str, Any]]
"""New cells by column, by the places of their rows, from 0."""


def can_copy(source: Path, out: Path) -> bool:
    """Whether both files have the same format, and one whose rows can be copied."""
    return source.suffix.lower() == out.suffix.lower() and out.suffix.lower() in COPIED


def copy_rows(source: Path, out: Path, places: np.ndarray, dialect: Dialect) -> None:
    """Write the rows at these places (ascending, from 0) atomically.

    Encoding, delimiter, header, byte order mark, quoting and line ends stay; blank lines go. Parquet keeps its schema.
    """
    with parents_of(out), replacing(out, private=True) as unfinished:
        if source.suffix.lower() == ".parquet":
            _copy_parquet(source, unfinished, places)
        else:
            _copy_text(source, unfinished, dialect, places.tolist())


def corrected_name(source: Table) -> str:
    """File name of a corrected copy: in the source's format; JSON lines for a hub data set."""
    return f"corrected{'.jsonl' if source.path is None else source.path.suffix.lower()}"


def write_corrected(source: Table, out: Path, cells: Cells) -> None:
    """Write a copy with new cells atomically; other rows stay byte for byte, except in a JSON array.

    A row with a new cell keeps its other values, but not always its quotes and the digits of its numbers (1.50).
    """
    path = source.path
    if path is None:
        write_rows(out, [{**row.cells, **cells.get(row.id, {})} for row in source])
        return
    with _fitting(out), replacing(out, private=True) as unfinished:
        if path.suffix.lower() == ".parquet":
            _correct_parquet(path, unfinished, cells, source.class_names)
        elif is_array(path, source.dialect):
            _correct_array(path, unfinished, source.dialect, cells)
        else:
            _copy_text(path, unfinished, source.dialect, cells=cells)


def _copy_text(
    source: Path,
    out: Path,
    dialect: Dialect,
    places: Iterable[int] | None = None,
    *,
    cells: Cells | None = None,
) -> None:
    """Copy the rows at `places`, or the whole file, with new cells."""
    if source.suffix.lower() in TABLES:
        spans = ((fields, start, end) for _, fields, start, end in records(source, dialect))
    else:
        lines = (([line], start, end) for _, line, start, end in json_lines(source, dialect))
        spans = chain([(list[str](), 0, dialect.mark)], lines)
    remaining, new, at = iter(count() if places is None else places), cells or {}, 0
    following = next(remaining, None)
    with open(source, "rb") as file, open(out, "wb") as copy:
        header, _, end = next(spans)
        copy.write(file.read(end))
        at = end
        for place, (fields, start, end) in enumerate(spans):
            if place == following:
                blank = file.read(start - at)
                copy.write(blank if places is None else b"")
                raw = file.read(end - start)
                if place in new:
                    raw = _corrected(raw, fields, header, dialect, new[place])
                copy.write(raw)
                following = next(remaining, None)
            at = file.seek(end)
        copy.write(file.read() if places is None else b"")


def _corrected(raw: bytes, fields: list[str], header: list[str], dialect: Dialect, new: Mapping[str, Any]) -> bytes:
    text = raw.decode(dialect.encoding)
    ending = text[len(text.rstrip("\r\n")) :]
    if not header:
        row = json.dumps({**json.loads(fields[0]), **new}, ensure_ascii=False)
        # Half a surrogate pair, which JSON can spell, stays as JSON spells it.
        return (row + ending).encode(dialect.encoding, errors="backslashreplace")
    for column, value in new.items():
        fields[header.index(column)] = str(value)
    if dialect.quoting == "literal":
        return ((dialect.delimiter or ",").join(fields) + ending).encode(dialect.encoding)
    line = io.StringIO()
    quoting = csv_quoting(fields)
    # Python before 3.13 quotes the line feed of a field only if lines end in one.
    csv.writer(line, delimiter=dialect.delimiter or ",", lineterminator="\n", quoting=quoting).writerow(fields)
    return (line.getvalue()[:-1] + ending).encode(dialect.encoding)


def _correct_array(path: Path, out: Path, dialect: Dialect, cells: Cells) -> None:
    document: Any = json.loads("".join(line for line, _ in dialect.lines(path, newline="\n")))
    for place, new in cells.items():
        rows_in(document)[place] |= new
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    mark = path.read_bytes()[: dialect.mark]
    out.write_bytes(mark + text.encode(dialect.encoding, errors="backslashreplace"))


def _copy_parquet(source: Path, out: Path, places: np.ndarray) -> None:
    """One row group in memory at a time."""
    before = 0
    with parquet_file(source) as file, pq.ParquetWriter(out, file.schema_arrow) as copy:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            here = places[(places >= before) & (places < before + rows)] - before
            if len(here):
                copy.write_table(file.read_row_group(group).take(here))
            before += rows


def _correct_parquet(path: Path, out: Path, cells: Cells, class_names: Mapping[str, Sequence[str]]) -> None:
    with parquet_file(path) as file:
        table = file.read()
    for column in {name: None for new in cells.values() for name in new}:
        numbers = {name: number for number, name in enumerate(class_names.get(column, ()))}
        at = table.schema.get_field_index(column)
        values = table.column(at).to_pylist()
        for place, new in cells.items():
            value = new.get(column, values[place])
            many = isinstance(value, list)
            values[place] = [numbers.get(one, one) for one in value] if many else numbers.get(value, value)
        kind = table.schema.field(at).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        made = pa.array(values, type=plain).cast(kind)
        table = table.set_column(at, table.schema.field(at), made)
    pq.write_table(table, out)
