"""Table: the rows of a split, read once into Arrow on disk, and the samples that a tokenizer makes of them."""

import hashlib
import json
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora.errors import DataError
from tsqlora.rows.chat import Format
from tsqlora.rows.labels import LabelMap
from tsqlora.rows.readers import PLAIN, Dialect
from tsqlora.rows.rows import Columns, Row, is_one, row_hash

NO_COLUMNS = Columns("", None, None)
CHUNK = 1024
"""Rows in memory at a time."""
NOTHING = pa.table({"input_ids": pa.array([], pa.list_(pa.int32())), "labels": pa.array([], pa.int64())})
"""No sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples(Sequence[dict[str, Any]]):
    """Tokenised rows as a Trainer takes them: this is a map-style torch data set.

    Args:
        stored: in Arrow, each decoded into plain lists and numbers on access: input_ids, attention_mask, token_type_ids
            if the tokenizer makes them, and labels if any; or a file, which `media.MediaCollator` decodes.
        hashes: a name for each sample that does not depend on the order.
        truncated: how many samples were cut to the maximal length.
        ids: the rows' places in their file, from 0.
        left_out: the place of every row whose target does not fit whole, and the tokens that it needs.
        cut_words: how many tokens with a tag are behind the cut, so that the model does not read them.
    """

    stored: pa.Table
    hashes: tuple[str, ...]
    truncated: int
    ids: np.ndarray
    left_out: tuple[tuple[str, int], ...] = ()
    cut_words: int = 0

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: Any) -> Any:
        """A sample as a dict; of a slice a list of them."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.stored.slice(range(len(self))[i], 1).to_pylist()[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample; steps of a recording, 0 for an image."""
        return lengths_in(self.stored)

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample: a number, or a row of k for several labels.  Tags have no such form."""
        column = self.stored["labels"]
        return np.array(column.to_pylist()) if pa.types.is_list(column.type) else column.to_numpy()


def samples_of(samples: Sequence[Mapping[str, Any]], *about: Any, **further: Any) -> Samples:
    """Put samples into Arrow; `about` and `further` have the other fields of Samples."""
    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string()}

    def kind(value: Any) -> pa.DataType:
        if not isinstance(value, list):
            return kinds[type(value)]
        return pa.list_(pa.float32() if value and isinstance(value[0], float) else pa.int32())

    if not len(samples):
        return Samples(NOTHING, *about, **further)
    schema = pa.schema([(key, kind(value)) for key, value in samples[0].items()])
    return Samples(pa.Table.from_pylist(list(samples), schema=schema), *about, **further)


def of_rows(
    samples: Sequence[dict[str, Any]], rows: Sequence[Row], columns: Columns, *, truncated: int, **about: Any
) -> Samples:
    """The samples of some rows, a sample each; `about` has further fields."""
    ids = np.array([row.id for row in rows], dtype=np.int64)
    return samples_of(samples, tuple(row_hash(row.cells, columns) for row in rows), truncated, ids, **about)


def length_of(sample: Mapping[str, Any]) -> int:
    """Tokens of a sample; of a file the steps of its recording, or 0."""
    return int(sample["length"]) if "length" in sample else len(sample["input_ids"])


def lengths_in(stored: pa.Table) -> list[int]:
    """As `length_of`, of each sample in Arrow."""
    if "length" in stored.column_names:
        return stored["length"].to_pylist()
    return pc.list_value_length(stored["input_ids"]).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The rows of one split: read once, and read again from Arrow on disk.

    Args:
        name: their file, for messages.
        stored: number and cells of every row of the file; cells are a struct, or JSON text where types may mix.
        names: every column that some row has, in order of first appearance.
        ids: the places of this split's rows in the file, ascending from 0.
        typed: False if the format has no types (CSV), so that "3" may be the number 3.
        path: the file; None for a hub data set or a folder of files.
        kind: "image" or "audio" of a folder of files, whose rows have columns of this name and "label".
        class_names: of each column of class numbers its names, which take their place as rows are read.
        view: changes each row as it is read.
        columns, classes, format: those in use; `classes` is None for numbers and texts, `format` for all but texts.
        notes: rows that were left out, and an encoding that is a guess.
        samples: the tokenised rows, once there are any.
    """

    name: str
    stored: pa.Table
    names: tuple[str, ...]
    ids: np.ndarray
    typed: bool = True
    path: Path | None = None
    dialect: Dialect = PLAIN
    kind: str | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    view: Callable[[Row], Row] = lambda row: row
    columns: Columns = NO_COLUMNS
    classes: LabelMap | None = None
    format: Format | None = None
    notes: tuple[str, ...] = ()
    samples: Samples = Samples(NOTHING, (), 0, np.empty(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.chunks())

    def chunks(self) -> Iterator[list[Row]]:
        """The rows in order, at most CHUNK at a time."""
        start = 0
        for batch in self.stored.to_batches():
            ids = self.ids[slice(*np.searchsorted(self.ids, [start, start + len(batch)]))]
            if len(ids):
                try:
                    numbers, cells = (column.to_pylist() for column in batch.take(pa.array(ids - start)).columns)
                # Text that is not UTF-8, an impossible date, an unknown time zone …
                except (ValueError, KeyError, ArithmeticError) as error:
                    raise DataError(
                        f"{self.name} has a value that cannot be read ({error}); export it again"
                    ) from error
                texts = pa.types.is_string(batch.schema.field("cells").type)
                cells = map(json.loads, cells) if texts else map(without_filled, cells)
                cells = (with_names(row, self.class_names) for row in cells) if self.class_names else cells
                made = zip(cells, numbers, ids.tolist(), strict=True)
                yield [self.view(Row(cells, self.name, number, id)) for cells, number, id in made]
            start += len(batch)

    def at(self, place: int) -> Row:
        """One of the rows, from 0."""
        id = int(self.ids[place])
        (row,) = replace(self, stored=self.stored.slice(id, 1), ids=np.zeros(1, np.int64), view=lambda row: row)
        return self.view(replace(row, id=id))

    def digest(self) -> str:
        """SHA-256 of all rows as they are stored, whichever of them and however this table shows them."""
        digest = hashlib.sha256()
        for row in replace(self, ids=np.arange(len(self.stored)), class_names={}, view=lambda row: row):
            digest.update(f"{row.cells!r}\n".encode())
        return digest.hexdigest()

    def noted(self, *notes: str, warn: bool = True) -> "Table":
        """The table with further notes, of which it warns."""
        for note in notes if warn else ():
            warnings.warn(note, stacklevel=4)
        return replace(self, notes=(*self.notes, *notes))

    def numbered(self) -> "Table":
        """The table with class numbers in place of their names."""
        return replace(self, class_names={})

    def using(self, columns: Columns, classes: LabelMap | None = None, format: Format | None = None) -> "Table":
        """The table with these columns, as it spells them.

        The rows of a folder get their names; a table of files gets absolute paths, which count from it.
        """
        if not columns.media:
            columns = columns.spelled(self.names)
            format = format and replace(format, columns=format.columns.spelled(self.names))
        table, kind, column, before = self, self.kind or "", columns.text, self.view

        def renamed(row: Row) -> Row:
            return replace(row, cells={column: row.cells[kind], columns.label or "label": row.cells["label"]})

        def absolute(row: Row) -> Row:
            name = row.cells.get(column)
            if self.path is None or not isinstance(name, str) or not name.strip():
                return row
            return replace(row, number=name, cells={**row.cells, column: os.path.abspath(self.path.parent / name)})

        def labelled(row: Row) -> Row:
            ones = [name for name in columns.one_hot if is_one(row.cells.get(name))]
            return replace(row, cells={**row.cells, columns.label or "label": ones[0] if len(ones) == 1 else ones})

        if columns.one_hot and columns.label is not None:
            table = replace(self, view=lambda row: labelled(before(row)), names=(*self.names, columns.label))
        elif columns.media and kind:
            names = column, columns.label or "label"
            table = replace(self, view=lambda row: renamed(before(row)), kind=None, names=names)
        elif columns.media:
            table = replace(self, view=lambda row: absolute(before(row)), path=None)
        return replace(table, columns=columns, classes=classes, format=format)


def without_filled(cells: dict[str, Any]) -> dict[str, Any]:
    """The cells without null fields of objects inside: Arrow gives all objects in a column the fields of all.

    >>> without_filled({"messages": [{"role": "user", "name": None}], "label": None})
    {'messages': [{'role': 'user'}], 'label': None}
    """

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: own(inner) for key, inner in value.items() if inner is not None}
        return [own(inner) for inner in value] if isinstance(value, list) and value else value

    return {name: own(value) for name, value in cells.items()}


def with_names(cells: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The cells with names in place of class numbers, also in lists; -1, which means no class, is None.

    >>> with_names({"label": 1, "tags": [0, 1]}, {"label": ["bad", "good"], "tags": ["O", "B"]})
    {'label': 'good', 'tags': ['O', 'B']}
    """

    def named(number: Any, own: Sequence[str]) -> Any:
        return own[number] if type(number) is int and 0 <= number < len(own) else number

    def cell(value: Any, own: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [named(number, own) for number in value]
        return None if value == -1 else named(value, own)

    return {**cells, **{column: cell(cells[column], own) for column, own in names.items() if column in cells}}


def table_of(name: str, records: Iterable[tuple[int | str, dict[str, Any]]], **about: Any) -> Table:
    """Store numbered rows as a table; `about` has its other fields.  Raises DataError if there are none."""
    names = dict[str, None]()

    def batches() -> Iterator[pa.RecordBatch]:
        rows = iter(records)
        while part := list(islice(rows, CHUNK)):
            names.update((name, None) for _, row in part for name in row)
            try:
                cells = [json.dumps(row) for _, row in part]
            except RecursionError as error:
                raise DataError(f"{name}: a row from {part[0][0]} on is nested too deeply") from error
            yield pa.record_batch([pa.array([number for number, _ in part]), pa.array(cells)], ["number", "cells"])

    return _table(name, batches(), names, about)


def table_of_arrow(name: str, parts: Iterable[pa.RecordBatch | pa.Table], **about: Any) -> Table:
    """As `table_of`, of rows in Arrow, which keep their types; numbered from 1."""
    names = dict[str, None]()

    def batches() -> Iterator[pa.RecordBatch]:
        done = 0
        for part in parts:
            names.update(dict.fromkeys(part.schema.names))
            cells = part.to_struct_array()
            cells = cells.combine_chunks() if isinstance(cells, pa.ChunkedArray) else cells
            yield pa.record_batch([pa.array(np.arange(done + 1, done + len(part) + 1)), cells], ["number", "cells"])
            done += len(part)

    return _table(name, batches(), names, about)


def _table(name: str, batches: Iterable[pa.RecordBatch], names: Collection[str], about: Mapping[str, Any]) -> Table:
    stored = on_disk(batches)
    if stored is None:
        cure = "write at least one, or name another file" if about.get("path") else "name another split or data set"
        raise DataError(f"{name} has no rows; {cure}")
    return Table(name, stored, tuple(names), np.arange(len(stored)), **about)


FOLDER = ContextVar[Path | None]("folder", default=None)


@contextmanager
def stored_in(folder: Path) -> Iterator[None]:
    """Keep the rows that are read inside, and their samples, on the disk of a folder, in place of the system's own."""
    before = FOLDER.set(folder)
    try:
        yield
    finally:
        FOLDER.reset(before)


def on_disk(batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
    """Write Arrow to a temporary file, and map it to memory; None without rows.

    The file has no name, and vanishes with the process, however that ends.
    """
    writer: pa.RecordBatchStreamWriter | None = None
    with tempfile.TemporaryFile(dir=FOLDER.get()) as file:
        for batch in batches:
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            return None
        writer.close()
        file.flush()
        return pa.ipc.open_stream(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()


def store(parts: Iterable[Samples]) -> Samples:
    """Join parts, and put their samples on disk, as `on_disk`; one part is in memory at a time."""
    whole = list[Samples]()

    def batches() -> Iterator[pa.RecordBatch]:
        for part in parts:
            whole.append(replace(part, stored=NOTHING))
            yield from part.stored.to_batches() if len(part) else ()

    stored = on_disk(batches())
    return Samples(
        NOTHING if stored is None else stored,
        tuple(name for part in whole for name in part.hashes),
        sum(part.truncated for part in whole),
        np.concatenate([part.ids for part in whole]),
        tuple(one for part in whole for one in part.left_out),
        sum(part.cut_words for part in whole),
    )


def data_hash(tables: Mapping[str, Table]) -> str:
    """16 hex digits that identify the data: a hash of every sample of every split, in order."""
    digest, between = hashlib.sha256(), ""
    for name, table in tables.items():
        for h in table.samples.hashes:
            digest.update(f"{between}{name}:{h}".encode())
            between = "\n"
    return digest.hexdigest()[:16]


def notes_of(tables: Mapping[str, Table]) -> list[str]:
    """The notes of all tables, each once."""
    return list(dict.fromkeys(note for table in tables.values() for note in table.notes))
