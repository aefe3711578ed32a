"""Find the splits of a file, a directory or a hub data set, and read each into a table."""

import difflib
import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from glob import escape, glob, has_magic
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsqlora.errors import DataError, SettingsError, few, first_line
from tsqlora.libs.datasets import class_names, class_names_of_parquet, file_kinds
from tsqlora.libs.hub import DatasetName, is_hub_id
from tsqlora.rows.readers import (
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
)
from tsqlora.rows.rows import ENDINGS
from tsqlora.rows.table import CHUNK, Table, table_of, table_of_arrow

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
"""Splits of a directory or hub data set, and the names that each may have there."""

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
    tables = _open(train, requested=[name for name in SPLIT_NAMES if name not in explicit], hints=hints)
    if "train" not in tables:
        if not os.path.isdir(folder := os.path.expanduser(train)):
            raise DataError(f"{train} has no split train; set data.train to the training file")
        # Any JSON may be there, such as that of a model.
        rows = [
            one.name for one in _listed(Path(folder)) if one.is_file() and suffix_of(one) in {*SUFFIXES} - {".json"}
        ]
        such = f", such as {', '.join(os.path.join(train, name) for name in rows[:_SHOWN])}" if rows else ""
        raise DataError(
            f"{train} is a folder without a file train ({', '.join(SUFFIXES)}) and without folders of images or "
            f"recordings; set data.train to a file of rows{such}"
        )
    for name, path in explicit.items():
        tables[name] = open_table(path, split=name, hints=hints)
    if trusted is not None:
        named = _open(trusted, requested=("trusted",), hints=hints)
        tables["trusted"] = named.get("trusted") or open_table(trusted, hints=hints)
    return {name: tables[name] for name in ORDER if name in tables}


def _open(source: str | Path, *, requested: Collection[str], hints: Hints, most: int | None = None) -> dict[str, Table]:
    """Read those of the requested splits that the source has; a file, or one split, is the first of them.

    With `most` only the first rows of files and of saved data sets are read.
    """
    path, first = Path(os.path.expanduser(source)), next(iter(requested))
    if is_saved(path):
        whole = {"": path} if (path / _ABOUT).is_file() else {}
        folders = whole or {inner.name: inner for inner in _listed(path) if (inner / _ABOUT).is_file()}
        return _of_splits({name: partial(_saved, inner, most) for name, inner in folders.items()}, source, requested)
    if files := _files_of_splits(source, requested):
        return {split: _of_files(name, some, hints, most) for split, (name, some) in files.items()}
    if os.path.isdir(path):
        folders = {inner.name: inner for inner in _listed(path) if inner.is_dir()}
        names = _match_splits(folders, requested, source)
        if not names and not _match_splits(folders, SPLIT_NAMES, source):
            folders, names = {"": path}, {first: ""}
        tables = dict[str, Table]()
        for split, folder in ((split, folders[name]) for split, name in names.items()):
            about = next((one for suffix in SUFFIXES if (one := folder / f"metadata{suffix}").is_file()), None)
            if about is not None:
                tables[split] = _of_files(str(about), [about], hints)
            elif (kind := kind_of(folder)) is not None:
                tables[split] = table_of(str(folder), folder_rows(folder, kind), typed=False, kind=kind)
        return tables
    require_source(source)
    data = _load_hub(DatasetName.of(str(source)))
    splits = data if isinstance(data, dict) else {"": data}
    return _of_splits({name: partial(of_dataset, rows) for name, rows in splits.items()}, source, requested)


def _of_splits(
    splits: Mapping[str, Callable[[str], Table]], source: str | Path, requested: Collection[str]
) -> dict[str, Table]:
    """Read those of the requested splits that a data set has; one without splits, "", is the first of them."""
    if "" in splits:
        return {next(iter(requested)): splits[""](str(source))}
    names = _match_splits(splits, requested, source)
    return {split: splits[name](f"{source}[{name}]") for split, name in names.items()}


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
    names = _match_splits(files, requested, source, lambda name: _split_of(files[name][0]))
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


def _saved(folder: Path, most: int | None, name: str) -> Table:
    """A split that `save_to_disk` wrote, without an import of datasets.  Raises DataError for one with token ids."""

    def batches() -> Iterator[pa.RecordBatch]:
        for file in state["_data_files"]:
            with pa.memory_map(str(folder / file["filename"])) as stored, pa.ipc.open_stream(stored) as stream:
                for batch in stream:
                    yield from (batch.slice(start, CHUNK) for start in range(0, len(batch), CHUNK))

    try:
        about, state = (json.loads((folder / one).read_text(encoding="utf-8")) for one in (_ABOUT, "state.json"))
        features, most = about["features"] or {}, None if most is None else 1
        if "input_ids" not in features:
            return table_of_arrow(name, islice(batches(), most), class_names=class_names(features))
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} cannot be read as a saved data set ({first_line(error)})") from error
    raise DataError(f"{folder} holds token ids, not texts: a trainer prepared it; tsqlora audit --prepared {folder}")


def first_rows(source: str | Path, hints: Hints = SNIFF) -> list[dict[str, Any]]:
    """Return the cells of the first training rows of files and of saved data sets.

    None of media, and of the hub. Raises DataError for files that cannot be read.
    """
    if not is_saved(Path(os.path.expanduser(source))) and not _files_of_splits(source, ["train"]):
        return []
    with warnings.catch_warnings(action="ignore"):  # reading all rows gives them again
        table = _open(source, requested=["train"], hints=hints, most=FIRST).get("train")
    return [] if table is None else [row.cells for row in islice(table.numbered(), FIRST)]


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


def _match_splits(
    names: Collection[str], requested: Iterable[str], source: str | Path, stem: Callable[[str], str] = str
) -> dict[str, str]:
    """Map each split to the one name whose stem is among the split's usual names."""
    matches = {}
    for split in requested:
        hits = [name for name in names if stem(name).lower() in SPLIT_NAMES.get(split, (split,))]
        if len(hits) > 1:
            raise DataError(f"{source} has {len(hits)} candidates for {split}: {', '.join(hits)}; remove all but one")
        if hits:
            matches[split] = hits[0]
    return matches


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


def _of_files(name: str, paths: Sequence[Path], hints: Hints, most: int | None = None) -> Table:
    """Read files of rows of one kind, such as the hub's shards, as one table; or at most so many rows of the first.

    Raises DataError for several kinds.
    """
    kinds, path = {_require_reader(path) for path in paths}, paths[0]
    if len(kinds) > 1:
        raise DataError(f"{name} are files of several kinds ({', '.join(sorted(kinds))}); name files of one kind")
    own = path if len(paths) == 1 and kinds != {SHEETS} and path.suffix.lower() not in COMPRESSED else None
    if kinds == {".parquet"}:
        schema, named = _common(paths)
        batches = islice((batch for path in paths for batch in _batches(path, schema)), None if most is None else 1)
        return table_of_arrow(name, batches, path=own, class_names=named)
    if len(paths) > 1 and most is None:
        tables = [_of_files(str(path), [path], hints) for path in paths]
        rows = (
            (f"{path.name}:{row.number}", row.cells) for path, table in zip(paths, tables, strict=True) for row in table
        )
        return table_of(name, rows, typed=tables[0].typed, notes=tuple(note for one in tables for note in one.notes))
    suffix, dialect = suffix_of(path), sniff(path, hints)
    typed, notes = suffix != SHEETS and suffix not in TABLES, tuple(filter(None, [dialect.note(str(path))]))
    for note in notes:
        warnings.warn(note, stacklevel=4)

    def read(dialect: Dialect) -> Table:
        records = islice(READERS[suffix](path, dialect), most)
        return table_of(str(path), records, dialect=dialect, typed=typed, path=own, notes=notes)

    try:
        return read(dialect)
    except BrokenQuotesError:
        # Where quotes cannot enclose fields: as `quoting_of` sees them.
        quoting = quoting_of(path, dialect) if dialect.quoting is None else None
        if quoting is None:
            raise
    return read(replace(dialect, quoting=quoting))


def _common(paths: Sequence[Path]) -> tuple[pa.Schema, dict[str, Sequence[str]]]:
    """The columns of all Parquet files, with types that hold those of each, and their names of class numbers.

    Raises DataError where there are no such types, and for files that name the classes of a column differently.
    """
    common, first = pa.schema([]), dict[str, tuple[Path, Sequence[str]]]()
    for path in paths:
        with parquet_file(path) as file:
            schema = file.schema_arrow
        named = class_names_of_parquet(schema.metadata)
        try:
            common = pa.unify_schemas([common, schema.remove_metadata()], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{path}: a column has another type than in the files before it ({error}); write it with the same type"
            ) from error
        for column in schema.names:
            owner, names = first.setdefault(column, (path, named.get(column, ())))
            if names != named.get(column, ()):
                raise DataError(
                    f"{owner} and {path} have different names for the class numbers of column '{column}'; "
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


MEDIA_ENDINGS = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}
"""The kind of media of each file ending."""


def kind_of(folder: Path) -> str | None:
    """Whether the first file of media in a folder, its folders, or theirs is "image" or "audio"; None without any."""
    paths = chain.from_iterable(sorted(folder.glob(pattern)) for pattern in ("*", "*/*", "*/*/*"))
    endings = (path.suffix.lower() for path in paths if path.suffix.lower() in MEDIA_ENDINGS and path.is_file())
    return next(map(MEDIA_ENDINGS.__getitem__, endings), None)


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
        warnings.warn(f"{folder}: {len(others)} files are not read as {kind}: {few(others, _SHOWN)}", stacklevel=5)
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
