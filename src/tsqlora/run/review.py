"""`tsqlora audit --apply`: write the corrected rows of a reviewed table, and the reviewed rows as trusted rows."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from tsqlora.compat.yaml import YamlProblem, load_yaml
from tsqlora.data.labels import CLASS, KINDS, are_numbers, class_finder, join_labels, split_labels
from tsqlora.data.readers import Hints
from tsqlora.data.rows import Columns, Row, is_missing, is_one
from tsqlora.data.sources import open_table
from tsqlora.data.table import Table
from tsqlora.data.write import corrected_name, without_formulas, write_corrected, write_rows
from tsqlora.errors import DataError, nearest
from tsqlora.files import reading, writing
from tsqlora.quality.rows import REVIEWED_AS
from tsqlora.run.audit import AUDIT_FILE, source_digest
from tsqlora.run.config.settings import TaskSettings

TRUSTED_FILE = "trusted.jsonl"
SHOWN = 20
"""Classes that a message lists."""

Label = str | int
Find = Callable[[str], Label | None]
"""Finds the class of a label in any spelling."""


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

    The field `reviewed_as` of a trusted row is "suspect", or "check" where it was drawn at random.

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
    columns, find = Columns(**about["columns"]), _finder(about["classes"])
    opened = source.numbered() if are_numbers(about["classes"]) else source
    source, column = opened.using(columns), str(columns.label)
    rows, new = _rows_of(source, reviewed, column, find), dict[int, dict[str, Any]]()
    for one in reviewed:
        cells = rows[one.row] | new.get(one.row, {})
        if columns.one_hot:
            names = one.reviewed if isinstance(one.reviewed, list) else [one.reviewed]
            flags = {name: _as_flag(name in names, cells[name]) for name in columns.one_hot}
            new[one.row] = {column: cells[column], **flags}
        elif one.token is None:
            new[one.row] = {column: _as_written(one.reviewed, cells[column])}
        else:
            tags, j = cells[column], one.token
            new[one.row] = {column: [*tags[:j], _as_written(one.reviewed, tags[j]), *tags[j + 1 :]]}
    if columns.one_hot:  # the column of labels is not in the file
        source = opened
        for cells in (*rows.values(), *new.values()):
            del cells[column]
    changed = {row: own for row, own in new.items() if rows[row] | own != rows[row]}
    corrected = folder / corrected_name(source)
    with writing(corrected, trusted):
        for path in (table, about["source"]):
            reading(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_corrected(source, corrected, changed)
    whole = [row for row in new if row not in unread]
    # The loss of suspects, which are hard rows, does not show what the pool teaches.
    kinds = {one.row: "check" if one.is_check else "suspect" for one in reviewed}
    write_rows(trusted, [rows[row] | new[row] | {REVIEWED_AS: kinds[row]} for row in whole or new])
    partly = f"no row has all its listed tags reviewed, so {TRUSTED_FILE} has {len(new)} that are reviewed in part"
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
    columns = {**about["columns"], **({"label": None} if about["columns"].get("one_hot") else {})}
    settings |= {f"data.{name}": columns.get(name) for name in ("text", "text_pair", "label")}
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
    if isinstance(reviewed, list) and isinstance(cell, list):
        return [_as_written(label, cell[0] if cell else label) for label in reviewed]
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        return json.dumps(reviewed, ensure_ascii=False) if '"' in cell else str(reviewed)
    if isinstance(cell, bool):
        return reviewed == str(True)
    if isinstance(cell, int | float) and isinstance(reviewed, list):
        return reviewed[0] if len(reviewed) == 1 else reviewed
    return type(cell)(join_labels(reviewed)) if isinstance(cell, str | float) else join_labels(reviewed)


def _as_flag(one: bool, cell: Any) -> Any:
    """The cell of a column of zeros and ones, in the form that it has."""
    if is_one(cell) == one:
        return cell
    if isinstance(cell, str):
        return str(one if len(cell.strip()) > len("1.0") else int(one))
    return int(one) if cell is None else type(cell)(one)


def _read(filled: Table, classes: Sequence[Label], *, several: bool, tags: bool) -> tuple[list[Reviewed], set[int]]:
    """The rows of the table with a reviewed label, by row; and the rows with a tag that was not reviewed."""
    table = filled.name
    needed = ("row", *(["token"] if tags else []), "label", "reviewed_label")
    if lacking := [name for name in needed if name not in filled.names]:
        raise DataError(f"{table} has no column '{lacking[0]}'; give the table of an audit, or the export of its page")
    find = _finder(classes)
    by_row, unread = dict[tuple[int, int], Reviewed](), set[int]()
    for row in filled:
        if is_missing(row.cells.get("reviewed_label")):
            if tags:
                unread.add(_number(row, "row"))
            continue
        one = _reviewed(row, classes, find, several=several, tags=tags)
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


def _reviewed(row: Row, classes: Sequence[Label], find: Find, *, several: bool, tags: bool) -> Reviewed:
    cells, place = row.cells, row.place
    number, value = _number(row, "row"), str(cells["reviewed_label"])
    labels = list[Label]()
    for part in _parts(value, several=several):
        label = find(part)
        if label is None:
            choices = nearest(part.strip(), _near(part.strip(), {*map(str, classes)}))
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


def _parts(cell: Any, *, several: bool) -> list[str]:
    return [cell if isinstance(part, list) else str(part) for part in split_labels(cell)] if several else [cell]


def _near(value: str, classes: set[str]) -> set[str]:
    """The classes for a message: those with similar names if there are too many."""
    near = set(difflib.get_close_matches(value, classes, n=5, cutoff=0.5))
    return classes if len(classes) <= SHOWN else near or set(sorted(classes)[:SHOWN])


def _finder(classes: Sequence[Label]) -> Find:
    """As `class_finder`, also of a label as suspects.csv writes it."""
    find, cells = class_finder(classes), {_as_cell(str(label)): label for label in classes}
    return lambda text: cells.get(text) if find(text) is None else find(text)


def _as_cell(text: str) -> str:
    return str(without_formulas([{"label": text}])[0][0]["label"])


def _rows_of(source: Table, reviewed: Sequence[Reviewed], column: str, find: Find) -> dict[int, dict[str, Any]]:
    """The rows of the audited file, whose labels must be those of the table, in any spelling."""

    def classes(cell: Any, *, several: bool) -> list[Label]:
        labels = ((part, find(part)) for part in _parts(cell, several=several))
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
        if classes(one.label, several=several) != classes(own, several=several) and one.label != _as_cell(own):
            raise DataError(
                f"{one.place}: row {one.row} has the label {one.label!r} here and {own!r} in {source.name}; give the "
                "table of this audit, with its columns row and label unchanged"
            )
    return rows
