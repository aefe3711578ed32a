"""A copy of a file in which some rows have another label, and nothing else differs."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.data.dialect import TABLES, Dialect
from tsqlora.data.readers import json_lines, parquet_file, records
from tsqlora.data.rows import Source
from tsqlora.data.write import write_rows
from tsqlora.files import replacing

Labels = Mapping[int, str | int]
"""New labels by the places of their rows, from 0."""

Edit = tuple[int, int, bytes]
"""Where in a file's bytes something starts and ends, and what takes its place."""


def corrected_name(source: Source) -> str:
    """What a corrected copy is called: in the source's format, of a hub data set JSON lines."""
    return f"corrected{'.jsonl' if source.path is None else source.path.suffix.lower()}"


def write_corrected(source: Source, out: Path, column: str, labels: Labels) -> None:
    """Writes the copy whole or not at all.

    Of JSON lines, CSV and TSV all that is no changed row is copied byte by byte; Parquet keeps its schema.
    """
    path = source.path
    if path is None:
        rows = [{**row, column: labels[i]} if i in labels else row for i, row in enumerate(source.read().rows)]
        write_rows(out, rows)
        return
    with replacing(out) as unfinished:
        if path.suffix.lower() == ".parquet":
            _write_parquet(path, unfinished, column, labels)
        elif path.suffix.lower() in TABLES:
            _splice(path, unfinished, _record_edits(path, source.dialect, column, labels))
        elif _is_array(path, source.dialect):
            _write_array(path, unfinished, source.dialect, column, labels)
        else:
            _splice(path, unfinished, _line_edits(path, source.dialect, column, labels))


def _splice(source: Path, out: Path, edits: Iterator[Edit]) -> None:
    at = 0
    with open(source, "rb") as file, open(out, "wb") as copy:
        for start, end, changed in edits:
            copy.write(file.read(start - at))
            copy.write(changed)
            at = file.seek(end)
        copy.write(file.read())


def _line_edits(path: Path, dialect: Dialect, column: str, labels: Labels) -> Iterator[Edit]:
    for place, (_, line, start, end) in enumerate(json_lines(path, dialect)):
        if place in labels:
            row = json.dumps({**json.loads(line), column: labels[place]}, ensure_ascii=False)
            ending = line[len(line.rstrip("\r\n")) :]
            # Half a surrogate pair, which JSON can spell, is written as JSON spells it.
            yield start, end, (row + ending).encode(dialect.encoding, errors="backslashreplace")


def _record_edits(path: Path, dialect: Dialect, column: str, labels: Labels) -> Iterator[Edit]:
    found = records(path, dialect)
    _, header, _, _ = next(found)
    for place, (_, fields, start, end) in enumerate(found):
        if place in labels:
            fields[header.index(column)] = str(labels[place])
            with open(path, "rb") as file:
                file.seek(start)
                raw = file.read(end - start).decode(dialect.encoding)
            ending = raw[len(raw.rstrip("\r\n")) :]
            text, between = io.StringIO(), dialect.delimiter or ","
            # QUOTE_ALL for a lone "\r", which Python before 3.13 leaves unquoted.
            quoting = csv.QUOTE_ALL if any("\r" in field for field in fields) else csv.QUOTE_MINIMAL
            csv.writer(text, delimiter=between, lineterminator=ending, quoting=quoting).writerow(fields)
            yield start, end, text.getvalue().encode(dialect.encoding)


def _is_array(path: Path, dialect: Dialect) -> bool:
    first = next((line for _, line, _, _ in json_lines(path, dialect)), "")
    return path.suffix.lower() == ".json" and first.lstrip().startswith("[")


def _write_array(path: Path, out: Path, dialect: Dialect, column: str, labels: Labels) -> None:
    rows: list[dict[str, Any]] = json.loads("".join(line for line, _ in dialect.lines(path, newline="\n")))
    for place, label in labels.items():
        rows[place][column] = label
    text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    out.write_bytes(text.encode(dialect.encoding, errors="backslashreplace"))


def _write_parquet(path: Path, out: Path, column: str, labels: Labels) -> None:
    with parquet_file(path) as file:
        table = file.read()
    at = table.schema.get_field_index(column)
    values = table.column(at).to_pylist()
    for place, label in labels.items():
        values[place] = label
    kind = table.schema.field(at).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, type=plain).cast(kind)), out)
