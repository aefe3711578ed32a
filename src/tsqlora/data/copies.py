"""Copy a file byte by byte: some of its rows, or all of them with some corrected labels."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.dialect import TABLES, Dialect
from tsqlora.data.readers import is_array, json_lines, parquet_file, records
from tsqlora.data.table import Table
from tsqlora.data.write import csv_quoting, write_rows
from tsqlora.files import parents_of, replacing

COPIED = (".jsonl", ".parquet", *TABLES)
"""Formats whose rows can be copied as they stand."""

Labels = Mapping[int, Any]
"""New labels, or lists of them, by the places of their rows, from 0."""


def can_copy(source: Path, out: Path) -> bool:
    """Whether both files have the same format, and one whose rows can be copied."""
    return source.suffix.lower() == out.suffix.lower() and out.suffix.lower() in COPIED


def copy_rows(source: Path, out: Path, places: np.ndarray, dialect: Dialect) -> None:
    """Write the rows at these places (ascending, from 0) atomically.

    Encoding, delimiter, header, byte order mark, quoting and line ends stay; blank lines go. Parquet keeps its schema.
    """
    with parents_of(out), replacing(out) as unfinished:
        if source.suffix.lower() == ".parquet":
            _copy_parquet(source, unfinished, places)
        else:
            _copy_text(source, unfinished, dialect, places.tolist())


def corrected_name(source: Table) -> str:
    """File name of a corrected copy: in the source's format; JSON lines for a hub data set."""
    return f"corrected{'.jsonl' if source.path is None else source.path.suffix.lower()}"


def write_corrected(source: Table, out: Path, column: str, labels: Labels) -> None:
    """Write a copy with new labels atomically; other rows stay byte for byte, except in a JSON array.

    A row with a new label keeps its other values, but not always its quotes and the digits of its numbers (1.50).
    """
    path = source.path
    if path is None:
        rows = [{**row.cells, column: labels[row.id]} if row.id in labels else row.cells for row in source]
        write_rows(out, rows)
        return
    with replacing(out) as unfinished:
        if path.suffix.lower() == ".parquet":
            _correct_parquet(path, unfinished, column, labels)
        elif is_array(path, source.dialect):
            _correct_array(path, unfinished, source.dialect, column, labels)
        else:
            _copy_text(path, unfinished, source.dialect, column=column, labels=labels)


def _copy_text(
    source: Path,
    out: Path,
    dialect: Dialect,
    places: Iterable[int] | None = None,
    *,
    column: str = "",
    labels: Labels | None = None,
) -> None:
    """Copy the rows at `places`, or the whole file, with new labels."""
    spans = _records(source, dialect) if source.suffix.lower() in TABLES else _lines(source, dialect)
    remaining, labels, at = iter(count() if places is None else places), labels or {}, 0
    following = next(remaining, None)
    with open(source, "rb") as file, open(out, "wb") as copy:
        header, _, end = next(spans)
        copy.write(file.read(end))
        at = end
        for place, (cells, start, end) in enumerate(spans):
            if place == following:
                blank = file.read(start - at)
                copy.write(blank if places is None else b"")
                raw = file.read(end - start)
                if place in labels:
                    raw = _relabelled(raw, cells, header, dialect, column, labels[place])
                copy.write(raw)
                following = next(remaining, None)
            at = file.seek(end)
        copy.write(file.read() if places is None else b"")


def _records(path: Path, dialect: Dialect) -> Iterator[tuple[list[str], int, int]]:
    """Fields of the header and of each record, with their start and end in bytes."""
    return ((fields, start, end) for _, fields, start, end in records(path, dialect))


def _lines(path: Path, dialect: Dialect) -> Iterator[tuple[list[str], int, int]]:
    """An empty header, and each line of JSON, with their start and end in bytes."""
    yield [], 0, dialect.mark
    for _, line, start, end in json_lines(path, dialect):
        yield [line], start, end


def _relabelled(raw: bytes, cells: list[str], header: list[str], dialect: Dialect, column: str, label: Any) -> bytes:
    text = raw.decode(dialect.encoding)
    ending = text[len(text.rstrip("\r\n")) :]
    if not header:
        row = json.dumps({**json.loads(cells[0]), column: label}, ensure_ascii=False)
        # Half a surrogate pair, which JSON can spell, stays as JSON spells it.
        return (row + ending).encode(dialect.encoding, errors="backslashreplace")
    cells[header.index(column)] = str(label)
    line = io.StringIO()
    quoting = csv_quoting(cells)
    # Python before 3.13 quotes the line feed of a field only if lines end in one.
    csv.writer(line, delimiter=dialect.delimiter or ",", lineterminator="\n", quoting=quoting).writerow(cells)
    return (line.getvalue()[:-1] + ending).encode(dialect.encoding)


def _correct_array(path: Path, out: Path, dialect: Dialect, column: str, labels: Labels) -> None:
    rows: list[dict[str, Any]] = json.loads("".join(line for line, _ in dialect.lines(path, newline="\n")))
    for place, label in labels.items():
        rows[place][column] = label
    text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
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


def _correct_parquet(path: Path, out: Path, column: str, labels: Labels) -> None:
    with parquet_file(path) as file:
        table = file.read()
    at = table.schema.get_field_index(column)
    values = table.column(at).to_pylist()
    for place, label in labels.items():
        values[place] = label
    kind = table.schema.field(at).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, type=plain).cast(kind)), out)
