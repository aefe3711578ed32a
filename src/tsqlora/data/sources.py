"""Find the splits of a file, a directory or a hub data set, and read each into a table."""

import difflib
import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape, glob, has_magic
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyarrow as pa

from tsqlora.compat.datasets import class_names, class_names_of_parquet, file_kinds
from tsqlora.compat.hub import DatasetName, is_hub_id
from tsqlora.data.readers import (
    COMPRESSED,
    READERS,
    SHEETS,
    SNIFF,
    SUFFIXES,
    TABLES,
    BrokenQuotesError,
    Dialect,
    Hints,
    parquet_file,
    quoting_of,
    sniff,
    suffix_of,
    unpacked,
)
from tsqlora.data.rows import ENDINGS
from tsqlora.data.table import CHUNK, FOLDER, Table, table_of, table_of_arrow
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import reading

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
"""Splits of a directory or hub data set, and the names that each may have there."""

T = TypeVar("T")

ORDER = ("train", "trusted", "validation", "test")
"""All splits, in reading order; trusted rows are never taken from beside the training rows."""


_SHOWN = 3
"""Files of a folder that a message names."""
FIRST = 200
"""Rows that tell what a file holds."""


def open_table(source: str | Path, *, split: str | None = None, hints: Hints = SNIFF) -> Table:
    """Read a file, or one split of a directory or hub data set, into a table on disk.

    `split` names the split of a directory or hub data set; None takes the only one. A file is one split, whatever its
    name. Raises DataError for missing, empty and broken files, with file and line.
    """
    tables = _open(source, requested=SPLIT_NAMES if split is None else (split,), hints=hints)
    if len(tables) != 1:
        has = f"has the splits {', '.join(tables)}" if tables else f"has no split {split or ', '.join(SPLIT_NAMES)}"
        raise DataError(f"{source} {has}; name one file or one split of it")
    return next(iter(tables.values()))


def open_tables(
    train: str,
    validation: str | None,
    test: str | None,
    trusted: str | None = None,
    hints: Hints = SNIFF,
) -> dict[str, Table]:
    """Read all splits, in ORDER: always "train", and the others if there are any.

    `train` is a file, a directory of files named train.*, validation.* (valid.*, dev.*) and test.*, or a hub data set
    (`DatasetName`). An explicit `validation` or `test` replaces the split beside it. If `trusted` is a directory or hub
    id, its split of that name counts, else its only split.
    Raises DataError for missing files, and for two files of one split.
    """
    explicit = {name: path for name, path in (("validation", validation), ("test", test)) if path is not None}
    requested = [name for name in SPLIT_NAMES if name not in explicit]
    tables = _open(train, requested=requested, hints=hints)
    if "train" not in tables:
        _refuse_without_train(train)
    for name, path in explicit.items():
        tables[name] = open_table(path, split=name, hints=hints)
    if trusted is not None:
        named = _open(trusted, requested=("trusted",), hints=hints)
        tables["trusted"] = named.get("trusted") or open_table(trusted, hints=hints)
    return {name: tables[name] for name in ORDER if name in tables}


def _refuse_without_train(source: str) -> NoReturn:
    """Raise DataError that says what was looked for in a folder or data set, and what to name."""
    if not os.path.isdir(folder := os.path.expanduser(source)):
        raise DataError(f"{source} has no split train; set data.train to the training file")
    # Any JSON may be there, such as that of a model.
    files = [one.name for one in _listed(Path(folder)) if one.is_file() and suffix_of(one) in {*SUFFIXES} - {".json"}]
    such = f", such as {', '.join(os.path.join(source, name) for name in files[:_SHOWN])}" if files else ""
    raise DataError(
        f"{source} is a folder without a file train ({', '.join(SUFFIXES)}) and without folders of images or "
        f"recordings; set data.train to a file of rows{such}"
    )


def _open(source: str | Path, *, requested: Collection[str], hints: Hints) -> dict[str, Table]:
    """Read those of the requested splits that the source has; a file, or one hub split, is the first of them."""
    path = Path(os.path.expanduser(source))
    if is_saved(path):
        return _of_splits(_saved(path), str(source), requested)
    if files := _files_of_splits(source, requested):
        return {split: _of_files(name, some, hints) for split, (name, some) in files.items()}
    if os.path.isdir(path):
        folders = {inner.name: inner for inner in _listed(path) if inner.is_dir()}
        own = {name: name for name in folders}
        names = _match_splits(own, requested, source)
        if not names and not _match_splits(own, SPLIT_NAMES, source):
            folders, names = {"": path}, {next(iter(requested)): ""}
        tables = {split: _of_folder(folders[name], hints) for split, name in names.items()}
        return {split: table for split, table in tables.items() if table is not None}
    require_source(source)
    return _of_splits(_load_hub(DatasetName.of(str(source))), str(source), requested)


_ABOUT = "dataset_info.json"


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return os.path.isfile(path / "dataset_dict.json") or os.path.isfile(path / _ABOUT)


def _files_of_splits(source: str | Path, requested: Collection[str]) -> dict[str, tuple[str, list[Path]]]:
    """The files of rows of each requested split, with their name in messages; none of media, and of the hub.

    A directory has a file for each split, or shards of it, as on the hub. A train.log beside train.csv does not count.
    """
    path = Path(os.path.expanduser(source))
    # os.path, not pathlib, here and below: pathlib raises for names that no file can have.
    if os.path.isfile(path):
        return {next(iter(requested)): (str(path), [path])}
    if matching := _matching(source):
        return {next(iter(requested)): (str(source), matching)}
    if not os.path.isdir(path):
        return {}
    listed = [file for file in _listed(path) if file.is_file() and file.suffix.lower() not in MEDIA_ENDINGS]
    usual = {*requested, *chain.from_iterable(SPLIT_NAMES.values())}
    if usual.isdisjoint(_split_of(file).lower() for file in listed if suffix_of(file) in SUFFIXES):
        listed += [file for file in _listed(path / "data") if suffix_of(file) in SUFFIXES]
    read = {_split_of(file) for file in listed if suffix_of(file) in SUFFIXES}
    files = defaultdict[str, list[Path]](list)
    for file in listed:
        if suffix_of(file) in SUFFIXES or _split_of(file) not in read:
            files[SHARD.sub("", file.name)].append(file)
    names = _match_splits({name: _split_of(some[0]) for name, some in files.items()}, requested, source)
    return {split: (f"{path}/{name}", files[name]) for split, name in names.items()}


SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.|$)")
"""What the hub appends to the name of a split's file."""


def _split_of(file: Path) -> str:
    return SHARD.sub("", file.name).partition(".")[0] if suffix_of(file) in SUFFIXES else file.stem


def _matching(source: str | Path) -> list[Path]:
    """The files that a pattern such as data/train-*.parquet matches; none for other names."""
    pattern = os.path.expanduser(str(source))
    return sorted(map(Path, glob(pattern))) if has_magic(pattern) and not os.path.exists(pattern) else []


def is_local(source: str | Path) -> bool:
    """Whether a name is a file or a folder of this machine, or a pattern that matches files."""
    return os.path.exists(os.path.expanduser(source)) or bool(_matching(source))


def absolute(source: str) -> str:
    """The name of a file, a folder or a pattern from any directory; other names as they are."""
    name = os.path.expanduser(source)
    if os.path.exists(name):
        return os.path.abspath(name)
    return os.path.join(escape(os.getcwd()), name) if _matching(source) else source


def _saved(path: Path) -> Any:
    """A data set that `save_to_disk` wrote.  Raises DataError for one with token ids."""
    from datasets import load_from_disk  # seconds to import

    try:
        data: Any = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a saved data set ({next(iter(str(error).splitlines()), '')})"
        ) from error
    for part in data.values() if isinstance(data, dict) else [data]:
        if "input_ids" in part.column_names:
            raise DataError(
                f"{path} holds token ids, not texts: a trainer prepared it; tsqlora audit --prepared {path}"
            )
    return data


def _of_splits(data: Any, source: str, requested: Collection[str]) -> dict[str, Table]:
    """Those of the requested splits that a data set has; one without splits is the first of them."""
    if not isinstance(data, dict):
        return {next(iter(requested)): of_dataset(data, source)}
    names = _match_splits({name: name for name in data}, requested, source)
    return {split: of_dataset(data[name], f"{source}[{name}]") for split, name in names.items()}


def first_columns(source: str | Path, hints: Hints = SNIFF) -> tuple[str, ...]:
    """Return the columns of the first training rows, as `first_rows`."""
    return tuple(dict.fromkeys(name for cells in first_rows(source, hints) for name in cells))


def first_rows(source: str | Path, hints: Hints = SNIFF) -> list[dict[str, Any]]:
    """Return the cells of the first training rows of files and of saved data sets.

    None of media, and of the hub. Raises DataError for files that cannot be read.
    """
    path = Path(os.path.expanduser(source))
    if is_saved(path):
        splits = {inner.name: inner.name for inner in _listed(path) if (inner / _ABOUT).is_file()}
        return _first_saved(path / (_match_splits(splits, ["train"], source).get("train") or ""))
    files = _files_of_splits(source, SPLIT_NAMES)
    if "train" not in files:
        return []
    with warnings.catch_warnings(action="ignore"):  # reading all rows gives them again
        table = _of_file(files["train"][1][0], hints, most=FIRST)
    return [row.cells for row in replace(table, class_names={})]


def _first_saved(path: Path) -> list[dict[str, Any]]:
    """The first rows of a split that `save_to_disk` wrote, without an import of datasets."""
    try:
        files = json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]
        with pa.memory_map(str(path / files[0]["filename"])) as file, pa.ipc.open_stream(file) as stream:
            return next((batch.slice(0, FIRST).to_pylist() for batch in stream), [dict.fromkeys(stream.schema.names)])
    except (OSError, ValueError, LookupError):
        return []  # reading all rows says what is wrong


def require_source(source: str | Path) -> None:
    """Raise DataError unless `source` is files of rows, a directory or a hub id. This opens no file, and no torch."""
    path = Path(os.path.expanduser(source))
    files = [path] if os.path.isfile(path) else _matching(source)
    for file in files:
        _require_reader(file)
    if files or os.path.isdir(path):
        return
    if path.suffix.lower() in SUFFIXES or isinstance(source, Path) or not is_hub_id(DatasetName.of(source).id):
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


def _of_folder(path: Path, hints: Hints) -> Table | None:
    """A folder of images or recordings, by its metadata table if it has one; None for other folders."""
    tables = (path / f"metadata{suffix}" for suffix in SUFFIXES)
    if (table := next((one for one in tables if one.is_file()), None)) is not None:
        return _of_file(table, hints)
    if (kind := kind_of(path)) is None:
        return None
    return table_of(str(path), folder_rows(path, kind), typed=False, kind=kind)


def _require_reader(path: Path) -> str:
    """The suffix of a file of rows.  Raises DataError for another file, SettingsError where its reader is missing."""
    suffix = suffix_of(path)
    if suffix == SHEETS and find_spec("openpyxl") is None:
        raise SettingsError(f"{path} is a spreadsheet, and needs openpyxl to be read: pip install 'tsqlora[excel]'")
    if suffix in (".xls", ".xlsb", ".ods"):
        raise DataError(f"{path} is a spreadsheet of a kind that is not read; save it as .xlsx, or as CSV UTF-8")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: extension '{suffix}' is unknown; choices: {', '.join(SUFFIXES)}, or one of them .gz")
    return suffix


def _of_file(path: Path, hints: Hints, most: int | None = None) -> Table:
    """Read a file of rows, or at most so many of them."""
    suffix = _require_reader(path)
    if path.suffix.lower() in COMPRESSED:
        with unpacked(path, FOLDER.get()) as plain:
            table = _of_file(plain, hints, most)
        notes = tuple(note.replace(str(plain), str(path)) for note in table.notes)
        return replace(table, name=str(path), path=None, notes=notes)
    reading(path)
    if suffix == ".parquet":
        with parquet_file(path) as file:
            batches = file.iter_batches(CHUNK) if most is None else islice(file.iter_batches(most), 1)
            names = class_names_of_parquet(file.schema_arrow.metadata)
            return table_of_arrow(str(path), batches, path=path, class_names=names)
    dialect = sniff(path, hints)
    notes = ()
    if note := dialect.note(str(path)):
        warnings.warn(note, stacklevel=4)
        notes = (note,)
    is_sheet = suffix == SHEETS  # whose corrected copy is JSON lines
    about = {"typed": not is_sheet and suffix not in TABLES, "path": None if is_sheet else path, "notes": notes}

    def read(dialect: Dialect) -> Table:
        return table_of(str(path), islice(READERS[suffix](path, dialect), most), dialect=dialect, **about)

    try:
        return read(dialect)
    except BrokenQuotesError as error:
        # Where quotes cannot enclose fields: as `quoting_of` sees them.
        quoting = quoting_of(path, dialect) if error.broken and dialect.quoting is None else None
        if quoting is None:
            raise
    return read(replace(dialect, quoting=quoting))


def _of_files(name: str, paths: Sequence[Path], hints: Hints) -> Table:
    """Files of one kind, such as the hub's shards, as one table.  Raises DataError for several kinds."""
    if len(paths) == 1:
        return _of_file(paths[0], hints)
    kinds = {suffix_of(path) for path in paths}
    if len(kinds) > 1:
        raise DataError(f"{name} are files of several kinds ({', '.join(sorted(kinds))}); name files of one kind")
    if kinds == {".parquet"}:
        schema, class_names = _common(paths)
        batches = (batch for path in paths for batch in _batches(path, schema))
        return table_of_arrow(name, batches, class_names=class_names)
    tables = [_of_file(path, hints) for path in paths]
    rows = (
        (f"{path.name}:{row.number}", row.cells) for path, table in zip(paths, tables, strict=True) for row in table
    )
    notes = tuple(note for table in tables for note in table.notes)
    return table_of(name, rows, typed=tables[0].typed, notes=notes)


def _common(paths: Sequence[Path]) -> tuple[pa.Schema, dict[str, Sequence[str]]]:
    """The columns of all Parquet files, with types that hold those of each, and their names of class numbers.

    Raises DataError where there are no such types, and for files that name the classes of a column differently.
    """
    common, first = pa.schema([]), dict[str, tuple[Path, Sequence[str]]]()
    for path in paths:
        with parquet_file(path) as file:
            schema = file.schema_arrow
        class_names = class_names_of_parquet(schema.metadata)
        for field in schema:
            try:
                common = pa.unify_schemas([common, pa.schema([field])], promote_options="permissive")
            except pa.ArrowException as error:
                raise DataError(
                    f"{path}: column '{field.name}' is {field.type}, and {common.field(field.name).type} in files "
                    "before it; write it with the same type"
                ) from error
            owner, names = first.setdefault(field.name, (path, class_names.get(field.name, ())))
            if names != class_names.get(field.name, ()):
                raise DataError(
                    f"{owner} and {path} have different names for the class numbers of column '{field.name}'; "
                    "write the names in place of the numbers"
                )
    return common, {column: names for column, (_, names) in first.items() if names}


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch | pa.Table]:
    with parquet_file(path) as file:
        for batch in file.iter_batches(CHUNK):
            if batch.schema.equals(schema):
                yield batch
            else:
                parts = [schema.empty_table(), pa.Table.from_batches([batch])]
                yield pa.concat_tables(parts, promote_options="permissive")


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
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
        raise DataError(f"{name.id} is a file format, not a data set; name a file, or a directory of splits")
    try:
        data: Any = datasets.load_dataset(name.id, name.configuration, split=name.split)
        return data if name.split is not None else {str(split): rows for split, rows in data.items()}
    except Exception as exc:
        reason = " ".join(str(exc).splitlines()[:2]) or type(exc).__name__
        raise DataError(
            f"{name.id} is neither a local file or directory nor a loadable hub data set ({reason}); "
            f"{_nearest_file(Path(name.id))}correct it (ID:CONFIGURATION[SPLIT]), or download it and name the file"
        ) from exc


def of_dataset(data: Any, name: str) -> Table:
    """A `datasets.Dataset` as a table."""
    parts, names = data.with_format("arrow").iter(CHUNK), class_names(data.features.to_dict())
    return table_of_arrow(name, parts, class_names=names)


MEDIA_ENDINGS = frozenset(ending for endings in ENDINGS.values() for ending in endings)


def kind_of(folder: Path) -> str | None:
    """Whether the first file of media in a folder, its folders, or theirs is "image" or "audio"; None without any."""
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(folder.glob(pattern)):
            for kind, endings in ENDINGS.items():
                if path.suffix.lower() in endings and path.is_file():
                    return kind
    return None


def folder_rows(folder: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The files of this kind, each with its path below the folder, and its row: an absolute path and the class.

    The class is the name of the first folder on that path; a file that lies beside these folders has none. Warns of
    files of other kinds.
    """
    rows, others = list[tuple[str, dict[str, Any]]](), list[str]()
    for path in sorted(_files(folder)):
        below = path.relative_to(folder)
        if path.suffix.lower() in ENDINGS[kind]:
            label = below.parts[0] if len(below.parts) > 1 else None
            rows.append((str(below), {kind: os.path.abspath(path), "label": label}))
        else:
            others.append(str(below))
    if others:
        shown = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        warnings.warn(f"{folder}: {len(others)} files are not read as {kind}: {shown}", stacklevel=5)
    return rows


def folder_digest(folder: Path, kind: str) -> str:
    """SHA-256 of the paths and sizes of the files that `folder_rows` reads."""
    files = (path for path in sorted(_files(folder)) if path.suffix.lower() in ENDINGS[kind])
    listing = [(str(path.relative_to(folder)), path.stat().st_size if path.exists() else None) for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden; links lead to folders elsewhere, to each once."""
    root, followed = Path(os.path.realpath(folder)), set[Path]()

    def enters(path: Path) -> bool:
        if not path.is_symlink():
            return True
        target = Path(os.path.realpath(path))
        apart = not target.is_relative_to(root) and not root.is_relative_to(target) and target not in followed
        followed.add(target)
        return apart

    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and enters(Path(parent, name))]
        yield from (Path(parent, name) for name in files if not name.startswith("."))
