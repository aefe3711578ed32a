"""Some rows of a file copied as they stand: the bytes of a text format, the values and types of Parquet."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tsqlora.data.jsonl import json_lines
from tsqlora.data.tables import parquet_file, records
from tsqlora.data.utf8 import bom_length
from tsqlora.files import replacing

Span = tuple[int, int]
"""Where something starts and ends in a file's bytes."""


def can_copy(source: Path, out: Path) -> bool:
    """Whether both are of one format whose rows can be copied as they stand."""
    return source.suffix.lower() == out.suffix.lower() and out.suffix.lower() in COPIERS


def copy_rows(source: Path, out: Path, places: np.ndarray) -> None:
    """Writes the rows at these places (ascending, counted from 0) whole or not at all.

    Header, byte order mark, quoting and line ends are the source's; blank lines are left out.
    """
    with replacing(out) as unfinished:
        COPIERS[source.suffix.lower()](source, unfinished, places)


def _copy_spans(source: Path, out: Path, places: np.ndarray, *, spans: Callable[[Path], Iterator[Span]]) -> None:
    """`spans` gives what stands before the rows first, then each row."""
    found = spans(source)
    with open(source, "rb") as file, open(out, "wb") as copy:
        for start, end in chain([next(found)], _at(found, places)):
            file.seek(start)
            copy.write(file.read(end - start))


def _at(spans: Iterator[Span], places: np.ndarray) -> Iterator[Span]:
    before = 0
    for place in places.tolist():
        yield next(islice(spans, place - before, None))
        before = place + 1


def _json_spans(path: Path) -> Iterator[Span]:
    yield 0, bom_length(path)
    for _, _, start, end in json_lines(path):
        yield start, end


def _record_spans(path: Path, *, delimiter: str) -> Iterator[Span]:
    found = records(path, delimiter=delimiter)
    _, _, _, end = next(found)
    yield 0, end
    for _, _, start, end in found:
        yield start, end


def _copy_parquet(source: Path, out: Path, places: np.ndarray) -> None:
    """A row group at a time: so many rows are in memory."""
    before = 0
    with parquet_file(source) as file, pq.ParquetWriter(out, file.schema_arrow) as copy:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            here = places[(places >= before) & (places < before + rows)] - before
            if len(here):
                copy.write_table(file.read_row_group(group).take(here))
            before += rows


COPIERS: dict[str, Callable[[Path, Path, np.ndarray], None]] = {
    ".jsonl": partial(_copy_spans, spans=_json_spans),
    ".csv": partial(_copy_spans, spans=partial(_record_spans, delimiter=",")),
    ".tsv": partial(_copy_spans, spans=partial(_record_spans, delimiter="\t")),
    ".parquet": _copy_parquet,
}
