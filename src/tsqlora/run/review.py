"""`tsqlora audit --apply`: write the corrected rows of a reviewed table, and the reviewed rows as trusted rows."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from tsqlora.compat.yaml import YamlProblem, load_yaml
from tsqlora.data.labels import CLASS, KINDS, are_numbers, join_labels, split_labels
from tsqlora.data.readers import Hints
from tsqlora.data.rows import Columns, Row, is_missing
from tsqlora.data.sources import open_table
from tsqlora.data.table import Table
from tsqlora.data.write import corrected_name, without_formulas, write_corrected, write_rows
from tsqlora.errors import DataError, nearest
from tsqlora.files import reading, writing
from tsqlora.run.audit import AUDIT_FILE, source_digest
from tsqlora.run.config.settings import TaskSettings

TRUSTED_FILE = "trusted.jsonl"
SHOWN = 20
"""Classes that a message lists."""

Label = str | int


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A row's reviewed label, and the label that the table has for it; `place` is for errors."""

    place: str
    row: int
    label: str
    reviewed: Label | list[Label]
    """Of several labels all."""
    is_check: bool
    token: int | None = None
    """The number of the tag's token."""


def apply_review(table: Path, out: Path | None = None, *, encoding: str | None = None) -> dict[str, Any]:
    """Write corrected.EXT, in the format of the audited file, and trusted.jsonl, the rows with a reviewed label.

    Rows of images or recordings become corrected.jsonl, with absolute paths. `encoding` is that of the table, if it is
    not UTF-8; None is the audit's.
    audit.json, in `out` or beside the table, names the audited file. Raises DataError, with row and value, for a
    label that is not a class and a row that the file lacks; and if the file has changed since the audit.
    """
    about, folder = _about(table, out)
    kind = KINDS[about.get("answer", CLASS.name)]
    filled = open_table(table, hints=Hints(encoding=encoding or about["hints"].get("encoding")))
    reviewed, unread = _read(filled, about["classes"], several=kind.joint, tags=kind.by_token)
    trusted = folder / TRUSTED_FILE
    with writing(folder / "corrected.jsonl", trusted):  # the copy of several files, which are read here
        source = open_table(about["source"], split="train", hints=Hints(**about["hints"]))
    before = about["sha256"]
    if before is not None and source_digest(source) != before:
        raise DataError(f"{source.name} has changed since its audit; audit it again")
    source = (source.numbered() if are_numbers(about["classes"]) else source).using(Columns(**about["columns"]))
    column = str(about["columns"]["label"])
    rows = _rows_of(source, reviewed, column, _names(about["classes"]))
    cells = dict[int, Any]()
    for one in reviewed:
        cell = cells.get(one.row, rows[one.row][column])
        if one.token is None:
            written = _as_written(one.reviewed, cell)
            # A copy of a table or folder of media is JSON lines, where all labels must be of one type.
            cells[one.row] = str(written) if source.path is None and isinstance(cell, str) else written
        else:
            cells[one.row] = [*cell[: one.token], one.reviewed, *cell[one.token + 1 :]]
    changed = {row: cell for row, cell in cells.items() if str(cell) != str(rows[row][column])}
    corrected = folder / corrected_name(source)
    with writing(corrected, trusted):
        for path in (table, about["source"]):
            reading(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_corrected(source, corrected, column, changed)
    whole = [row for row in cells if row not in unread]
    write_rows(trusted, [{**rows[row], column: cells[row]} for row in whole or cells])
    partly = f"no row has all its listed tags reviewed, so {TRUSTED_FILE} has {len(cells)} that are reviewed in part"
    return {
        "out": str(folder),
        "corrected": str(corrected),
        "trusted": str(trusted),
        "reviewed": len(reviewed),
        "changed": len(changed),
        "checks": sum(one.is_check for one in reviewed),
        "notes": [] if whole else [partly],
        "next": _training(about, corrected, trusted),
    }


def _training(about: Mapping[str, Any], corrected: Path, trusted: Path) -> str:
    """The command that trains on the corrected rows, with the settings of the audit."""
    task = about.get("task")
    settings = {"task.type": None if task == TaskSettings().type else task}
    settings |= {f"data.{name}": about["columns"].get(name) for name in ("text", "text_pair", "label")}
    settings |= {f"data.{name}": value for name, value in about["hints"].items()} | {"data.trusted": str(trusted)}
    words = [word for name, value in settings.items() if value for word in ("--set", f"{name}={_as_yaml(value)}")]
    return " ".join(map(quote, ("tsqlora", "train", "--model", "M", "--data", str(corrected), *words)))


def _as_yaml(text: str) -> str:
    """A text for --set, in quotes if YAML would read something else."""
    try:
        plain = load_yaml(text) == text
    except YamlProblem:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _about(table: Path, out: Path | None) -> tuple[dict[str, Any], Path]:
    """The content of audit.json, and the folder for corrections: `out`, or that of audit.json."""
    places = [*([] if out is None else [out]), table.parent]
    path = next((place / AUDIT_FILE for place in places if (place / AUDIT_FILE).is_file()), None)
    if path is None:
        folders = " or ".join(map(str, places))
        raise DataError(f"no {AUDIT_FILE}, which names the audited file, in {folders}; give the audit's --out")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if {"source", "sha256", "hints", "columns", "classes"} <= about.keys():
            return about, out or path.parent
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); audit again") from None
    raise DataError(f"{path} is not the record of an audit; audit again")


def _as_written(reviewed: Label | list[Label], cell: Any) -> Any:
    """The reviewed label or labels in the form of the file's cell; several in place of a number are a list."""
    if isinstance(cell, int) and isinstance(reviewed, list):
        return reviewed[0] if len(reviewed) == 1 else reviewed
    return reviewed if isinstance(cell, list) else join_labels(reviewed)


def _read(filled: Table, classes: Sequence[Label], *, several: bool, tags: bool) -> tuple[list[Reviewed], set[int]]:
    """The rows of the table with a reviewed label, by row; and the rows with a tag that was not reviewed."""
    table = filled.name
    needed = ("row", *(["token"] if tags else []), "label", "reviewed_label")
    if lacking := [name for name in needed if name not in filled.names]:
        raise DataError(f"{table} has no column '{lacking[0]}'; give the table of an audit, or the export of its page")
    names = _names(classes)
    by_row, unread = dict[tuple[int, int], Reviewed](), set[int]()
    for row in filled:
        if is_missing(row.cells.get("reviewed_label")):
            if tags:
                unread.add(_number(row, "row"))
            continue
        one = _reviewed(row, names, several=several, tags=tags)
        if by_row.setdefault((one.row, one.token or 0), one).reviewed != one.reviewed:
            raise DataError(f"{one.place}: row {one.row} has two different reviews; remove one")
    if not by_row:
        raise DataError(f"no row of {table} has a reviewed_label; fill in the right label where you are sure")
    return [by_row[key] for key in sorted(by_row)], unread


def _number(row: Row, column: str) -> int:
    number = str(row.cells[column]).strip()
    if not number.isdecimal():
        raise DataError(f"{row.place}: {column} {number!r} is not a {column} number; restore the column {column}")
    return int(number)


def _reviewed(row: Row, names: Mapping[str, Label], *, several: bool, tags: bool) -> Reviewed:
    cells, place = row.cells, row.place
    number, value = _number(row, "row"), str(cells["reviewed_label"])
    labels = list[Label]()
    for part in _parts(value, several=several):
        label = _class_of(part, names)
        if label is None:
            choices = nearest(part.strip(), _near(part.strip(), {str(label) for label in names.values()}))
            raise DataError(f"{place}: row {number} has the reviewed_label {part.strip()!r}, not a class; {choices}")
        labels.append(label)
    return Reviewed(
        place,
        number,
        str(cells["label"]),
        labels if several else labels[0],
        cells.get("kind") == "check",
        _number(row, "token") if tags else None,
    )


def _parts(cell: str, *, several: bool) -> list[str]:
    # A list that pandas wrote as text is one part, and no class.
    return [part if isinstance(part, str) else cell for part in split_labels(cell)] if several else [cell]


def _class_of(text: str, names: Mapping[str, Label]) -> Label | None:
    return names.get(text, names.get(_folded(text)))


def _near(value: str, classes: set[str]) -> set[str]:
    """The classes for a message: those with similar names if there are too many."""
    near = set(difflib.get_close_matches(value, classes, n=5, cutoff=0.5))
    return classes if len(classes) <= SHOWN else near or set(sorted(classes)[:SHOWN])


def _names(classes: Sequence[Label]) -> dict[str, Label]:
    """Every spelling of a class: its own, that of suspects.csv, and in other case if only one class has it.

    pandas writes the integers of a column with empty cells as 1.0.
    """
    names = {str(label): label for label in classes}
    names |= {f"{label}.0": label for label in classes if isinstance(label, int)}
    folded: dict[str, list[Label]] = {}
    for label in classes:
        folded.setdefault(_folded(str(label)), []).append(label)
    names |= {_as_cell(str(label)): label for label in classes if _as_cell(str(label)) not in names}
    return {key: owners[0] for key, owners in folded.items() if len(owners) == 1} | names


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _as_cell(text: str) -> str:
    return str(without_formulas([{"label": text}])[0][0]["label"])


def _rows_of(
    source: Table, reviewed: Sequence[Reviewed], column: str, names: Mapping[str, Label]
) -> dict[int, dict[str, Any]]:
    """The rows of the audited file, whose labels must be those of the table, in any spelling."""

    def classes(cell: str, *, several: bool) -> list[Label]:
        labels = ((part, _class_of(part, names)) for part in _parts(cell, several=several))
        return [part if label is None else label for part, label in labels]

    ids = np.intersect1d(source.ids, [one.row for one in reviewed])
    rows = {row.id: row.cells for row in replace(source, ids=ids)}
    for one in reviewed:
        if one.row not in rows:
            raise DataError(f"{one.place}: {source.name} has no row {one.row}; its rows are numbered from 0")
        cell = rows[one.row].get(column)
        if one.token is not None:
            cell = cell[one.token] if isinstance(cell, list) and one.token < len(cell) else ""
        several = isinstance(one.reviewed, list)
        own = str(join_labels(split_labels(cell) if several else cell))
        if one.label in (own, _as_cell(own)):
            continue
        if classes(one.label, several=several) != classes(own, several=several):
            raise DataError(
                f"{one.place}: row {one.row} has the label {one.label!r} here and {own!r} in {source.name}; give the "
                "table of this audit, with its columns row and label unchanged"
            )
    return rows
