"""Open a file, a directory of splits or a hub data set, and read its rows with their line numbers."""

import difflib
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.compat.datasets import file_kinds, list_names
from tsqlora.compat.hub import DatasetName, is_hub_id
from tsqlora.data.dialect import PLAIN, SNIFF, TABLES, Dialect, Hints, sniff
from tsqlora.data.folders import MEDIA_ENDINGS, folder_rows, kind_of
from tsqlora.data.readers import READERS, Records
from tsqlora.errors import DataError
from tsqlora.files import reading

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
"""Splits of a directory or hub data set, and the names that each may have there."""

ORDER = ("train", "trusted", "validation", "test")
"""All splits, in reading order; trusted rows are never taken from beside the training rows."""

CHUNK = 1024
"""Rows of a source in memory at a time."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one source; `numbers[i]` is the line or row of `rows[i]` in `source`, from 1, or its file there.

    Args:
        typed: False if the format has no types (CSV), so that "3" may be the number 3.
        places: the rows' places in the source, from 0; None if they are all of it.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    numbers: tuple[int | str, ...]
    typed: bool = True
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> np.ndarray:
        """The place of each row in its source, from 0."""
        return np.arange(len(self)) if self.places is None else self.places

    def place(self, i: int) -> str:
        """File and line of row i, for errors: `train.jsonl:17`."""
        return f"{self.source}:{self.numbers[i]}"

    def take(self, indices: Iterable[int]) -> "Rows":
        """Some of the rows, each with its number and place."""
        chosen = list(indices)
        rows, numbers = (tuple(values[i] for i in chosen) for values in (self.rows, self.numbers))
        return replace(self, rows=rows, numbers=numbers, places=self.ids[chosen])


@dataclass(frozen=True, slots=True)
class Source:
    """One split, opened but not read; `path` is its file, None for a hub data set or a folder of files."""

    name: str
    typed: bool
    path: Path | None
    records: Callable[[], Records]
    dialect: Dialect = PLAIN
    kind: str | None = None
    """"image" or "audio" of a folder of files, whose rows have columns of this name and "label"."""

    def with_files(self, columns: Mapping[str, Any]) -> "Source":
        """The rows of a folder under the names of these columns; of a table with absolute paths, which count from it.

        Columns without media change nothing.
        """
        kind, path, column = self.kind, self.path, columns["text"]
        if not columns.get("media"):
            return self

        def records() -> Records:
            for number, row in self.records():
                name = row.get(column)
                if kind is not None:
                    yield number, {column: row[kind], columns["label"] or "label": row["label"]}
                elif path is not None and isinstance(name, str) and name.strip():
                    yield name, {**row, column: os.path.abspath(path.parent / name)}
                else:
                    yield number, row

        return replace(self, records=records, path=None, kind=None)

    def read(self, places: np.ndarray | None = None) -> Rows:
        """All rows, or those at `places`, in memory.  Raises as `chunks`."""
        parts = list(self.chunks(places))
        rows, numbers = (tuple(chain.from_iterable(getattr(p, name) for p in parts)) for name in ("rows", "numbers"))
        return Rows(rows, self.name, numbers, typed=self.typed, places=np.concatenate([part.ids for part in parts]))

    def chunks(self, places: np.ndarray | None = None) -> Iterator[Rows]:
        """The rows in order, or those at `places` (ascending), CHUNK at a time.

        Raises DataError for broken files, and for a source without rows.
        """
        records, start = iter(self.records()), 0
        while part := list(islice(records, CHUNK)):
            numbers, rows = zip(*part, strict=True)
            here = Rows(rows, self.name, numbers, typed=self.typed, places=np.arange(start, start + len(rows)))
            if places is None:
                yield here
            elif len(chosen := places[slice(*np.searchsorted(places, [start, start + len(rows)]))]):
                yield here.take(chosen - start)
            start += len(rows)
        if start == 0:
            cure = "name another split or data set" if self.path is None else "write at least one, or name another file"
            raise DataError(f"{self.name} has no rows; {cure}")

    def columns(self) -> tuple[str, ...]:
        """Every column that some row has, in order of first appearance."""
        return tuple(dict.fromkeys(name for rows in self.chunks() for name in column_names(rows)))


def column_names(rows: Rows) -> tuple[str, ...]:
    """Every column that some row has, in order of first appearance."""
    return tuple(dict.fromkeys(name for row in rows.rows for name in row))


def read_rows(source: str | Path, *, split: str | None = None, hints: Hints = SNIFF) -> Rows:
    """Read the rows of a file, or of one split of a directory or hub data set.

    `split` names the split of a directory or hub data set; None takes the only one. A file is one split, whatever its
    name. Raises DataError for missing, empty and broken files, with file and line.
    """
    return open_split(source, split=split, hints=hints).read()


def open_split(source: str | Path, *, split: str | None = None, hints: Hints = SNIFF) -> Source:
    """Open what `read_rows` reads."""
    splits = _open_splits(source, requested=SPLIT_NAMES if split is None else (split,), hints=hints)
    if len(splits) != 1:
        has = f"has the splits {', '.join(splits)}" if splits else f"has no split {split or ', '.join(SPLIT_NAMES)}"
        raise DataError(f"{source} {has}; name one file or one split of it")
    return next(iter(splits.values()))


def open_splits(
    train: str, validation: str | None, test: str | None, trusted: str | None = None, hints: Hints = SNIFF
) -> dict[str, Source]:
    """Open all splits, in ORDER: always "train", and the others if there are any.

    `train` is a file, a directory of files named train.*, validation.* (valid.*, dev.*) and test.*, or a hub data set
    (`DatasetName`). An explicit `validation` or `test` replaces the split beside it. If `trusted` is a directory or hub
    id, its split of that name counts, else its only split.
    Raises DataError for missing files, and for two files of one split.
    """
    explicit = {name: path for name, path in (("validation", validation), ("test", test)) if path is not None}
    splits = _open_splits(train, requested=[name for name in SPLIT_NAMES if name not in explicit], hints=hints)
    if "train" not in splits:
        raise DataError(f"{train} has no split train; set data.train to the training file")
    splits |= {name: open_split(path, split=name, hints=hints) for name, path in explicit.items()}
    if trusted is not None:
        named = _open_splits(trusted, requested=("trusted",), hints=hints)
        splits["trusted"] = named.get("trusted") or open_split(trusted, hints=hints)
    return {name: splits[name] for name in ORDER if name in splits}


def _open_splits(source: str | Path, *, requested: Collection[str], hints: Hints) -> dict[str, Source]:
    """Open those of the requested splits that the source has; a file, or one hub split, is the first of them.

    A directory has a file for each split, or a folder of images or recordings, or is such a folder itself. A train.log
    beside train.csv does not count.
    """
    path = Path(os.path.expanduser(source))
    # os.path, not pathlib, here and below: pathlib raises for names that no file can have.
    if os.path.isfile(path):
        return {next(iter(requested)): _of_file(path, hints)}
    if os.path.isdir(path):
        listed = [file for file in _listed(path) if file.is_file() and file.suffix.lower() not in MEDIA_ENDINGS]
        read = {file.stem for file in listed if file.suffix.lower() in READERS}
        files = {f.name: f for f in listed if f.stem not in read or f.suffix.lower() in READERS}
        names = _match_splits({name: file.stem for name, file in files.items()}, requested, source)
        if names:
            return {split: _of_file(files[name], hints) for split, name in names.items()}
        folders = {folder.name: folder for folder in _listed(path) if folder.is_dir()}
        own = {name: name for name in folders}
        names = _match_splits(own, requested, source)
        if not names and not _match_splits(own, SPLIT_NAMES, source):
            folders, names = {"": path}, {next(iter(requested)): ""}
        sources = {split: _of_folder(folders[name], hints) for split, name in names.items()}
        return {split: rows for split, rows in sources.items() if rows is not None}
    require_source(source)
    data = _load_hub(DatasetName.of(str(source)))
    if not isinstance(data, dict):
        return {next(iter(requested)): of_dataset(data, str(source), named=True)}
    names = _match_splits({name: name for name in data}, requested, source)
    return {split: of_dataset(data[name], f"{source}[{name}]", named=True) for split, name in names.items()}


def require_source(source: str | Path) -> None:
    """Raise DataError unless `source` is a file, a directory or a hub id. This opens nothing, and needs no torch."""
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path) or os.path.isdir(path):
        return
    if path.suffix.lower() in READERS or isinstance(source, Path) or not is_hub_id(DatasetName.of(source).id):
        raise DataError(f"no file {source}; {_nearest_file(path)}correct the path, seen from {Path.cwd()}")


def _match_splits(stems: Mapping[str, str], requested: Iterable[str], source: str | Path) -> dict[str, str]:
    """Map each split to the one name whose stem is among the split's usual names."""
    matches = {}
    for split in requested:
        usual = SPLIT_NAMES.get(split, (split,))
        hits = [name for name, stem in stems.items() if stem.lower() in usual]
        if len(hits) > 1:
            raise DataError(f"{source} has {len(hits)} candidates for {split}: {', '.join(hits)}; remove all but one")
        if hits:
            matches[split] = hits[0]
    return matches


def _of_folder(folder: Path, hints: Hints) -> Source | None:
    """A folder of images or recordings, by its metadata table if it has one; None for other folders."""
    tables = (folder / f"metadata{suffix}" for suffix in READERS)
    if (table := next((path for path in tables if path.is_file()), None)) is not None:
        return _of_file(table, hints)
    if (kind := kind_of(folder)) is None:
        return None
    rows = folder_rows(folder, kind)
    return Source(str(folder), False, None, lambda: iter(rows), kind=kind)


def _of_file(path: Path, hints: Hints) -> Source:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{path}: extension '{suffix}' is unknown; choices: {', '.join(READERS)}")
    reading(path)
    dialect = PLAIN if suffix == ".parquet" else sniff(path, hints)
    if note := dialect.note(str(path)):
        warnings.warn(note, stacklevel=4)
    return Source(str(path), suffix not in TABLES, path, partial(READERS[suffix], path, dialect), dialect)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as exc:
        raise DataError(f"cannot read {folder}: {exc.strerror}") from exc


def _nearest_file(path: Path) -> str:
    siblings = [file.name for file in _listed(path.parent)] if os.path.isdir(path.parent) else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean '{path.parent / close[0]}'? " if close else ""


def _load_hub(name: DatasetName) -> Any:
    """The splits of a hub data set by name, or the one split that the name selects.  Raises DataError for any error."""
    import datasets  # seconds to import, and only hub ids need it

    if name.id in file_kinds():  # load_dataset would read whatever files lie in the working directory
        raise DataError(f"{name.id} is a kind of file, not a data set; name a file, or a directory of splits")
    try:
        data: Any = datasets.load_dataset(name.id, name.configuration, split=name.split)
        return data if name.split is not None else {str(split): rows for split, rows in data.items()}
    except Exception as exc:
        reason = " ".join(str(exc).splitlines()[:2]) or type(exc).__name__
        raise DataError(
            f"{name.id} is neither a local file or directory nor a loadable hub data set ({reason}); "
            f"{_nearest_file(Path(name.id))}correct it (ID:CONFIGURATION[SPLIT]), or download it and name the file"
        ) from exc


def of_dataset(data: Any, name: str, *, named: bool = False) -> Source:
    """A `datasets.Dataset` as a source.

    If `named`, lists of class numbers, such as tags, become lists of the names that the data set has for them; else
    they stay, since a model that is already made may name its classes otherwise.
    """
    lists = list_names(data.features) if named else {}

    def records() -> Records:
        for start in range(0, len(data), CHUNK):
            rows = data.select(range(start, min(start + CHUNK, len(data)))).to_list()
            for column, names in lists.items():
                for row in rows:
                    row[column] = row[column] and [names.get(number, number) for number in row[column]]
            yield from enumerate(rows, start=start + 1)

    return Source(name, True, None, records)
