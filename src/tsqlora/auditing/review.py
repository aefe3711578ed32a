"""`tsqlora apply`: the rows of a reviewed audit, corrected and trusted, or of text clean and quarantined."""

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from tsqlora.auditing.command import AUDIT_FILE, FINDINGS_FILE, source_digest
from tsqlora.auditing.texts.findings import require_possible
from tsqlora.errors import DataError, SettingsError, nearest
from tsqlora.files import reading, write_json, writing
from tsqlora.libs.yaml import YamlProblem, load_yaml
from tsqlora.rows.datasets import REVIEWED_AS
from tsqlora.rows.labels import CLASS, KINDS, are_numbers, class_finder, join_labels, split_labels
from tsqlora.rows.readers import Hints
from tsqlora.rows.rows import Columns, Row, is_missing, is_one
from tsqlora.rows.sources import open_table, require_source
from tsqlora.rows.table import Table
from tsqlora.rows.write import copy_rows, without_formulas, write_rows
from tsqlora.settings.settings import TaskSettings

TRUSTED_FILE, CLEAN_FILE, QUARANTINE_FILE = "trusted.jsonl", "clean.jsonl", "quarantine.jsonl"
RECORDS = {FINDINGS_FILE: {"rows", "findings"}, AUDIT_FILE: {"hints", "columns", "classes"}}
"""The record of an audit of text, and of labels, with its keys beside `source` and `sha256`."""
SHOWN = 20
"""Classes that a message lists."""
DROP = {"drop", "remove", "x", "bad", "quarantine", "no"}
KEEP = {"", "keep", "ok", "yes", "good"}

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


def apply_review(
    review: Path, out: Path | None = None, *, drop: Collection[str] = (), encoding: str | None = None
) -> dict[str, Any]:
    """Write the rows of an audited file as reviewed, into `out`, by default the audit's folder.

    `review` is a reviewed table, or the folder of an audit of text; `out` or the table's folder holds the audit's
    record. `drop` are findings of an audit of text, all of whose rows go to quarantine. `encoding` is the table's; None
    is the audit's. Raises DataError, with row and value, for what the table or the file lacks,
    and if the file has changed since the audit; SettingsError for a finding that no row can have.
    """
    require_source(review)
    places, table = [review if review.is_dir() else review.parent], None if review.is_dir() else review
    places = places if out is None else [out, *places]
    record = next((place / name for place in places for name in RECORDS if (place / name).is_file()), None)
    folders = " or ".join(map(str, places))
    if (drop or table is None) and (record is None or record.name != FINDINGS_FILE):
        raise SettingsError(f"findings are dropped by the audit of a text file, and {folders} has none; give its --out")
    if record is None:
        raise DataError(f"no {AUDIT_FILE}, which names the audited file, in {folders}; give the audit's --out")
    try:
        about = json.loads(record.read_text(encoding="utf-8"))
        if not {"source", "sha256", *RECORDS[record.name]} <= about.keys():
            raise ValueError("it lacks keys")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{record} is not the record of an audit ({error}); audit again") from None
    folder = out or record.parent
    if record.name == FINDINGS_FILE:
        return _part(about, record, table, folder, drop, encoding)
    assert table is not None
    return _correct(about, table, folder, encoding)


def _source(about: Mapping[str, Any], *outputs: Path) -> Table:
    """The audited rows, which the outputs must not overwrite.  Raises DataError if they have changed."""
    with writing(*outputs):
        source = open_table(about["source"], split="train", hints=Hints(**about.get("hints", {})))
    if about["sha256"] is not None and source_digest(source) != about["sha256"]:
        raise DataError(f"{source.name} has changed since its audit; audit it again")
    return source


def _filled(table: Path, needed: Collection[str], encoding: str | None) -> Table:
    filled = open_table(table, hints=Hints(encoding=encoding))
    if lacking := [name for name in needed if name not in filled.names]:
        raise DataError(
            f"{filled.name} has no column '{lacking[0]}'; give the table of an audit, or the export of its page"
        )
    return filled


def _part(
    about: Mapping[str, Any],
    record: Path,
    table: Path | None,
    folder: Path,
    drop: Collection[str],
    encoding: str | None,
) -> dict[str, Any]:
    """Write each row of the audited file to one of two files.

    Rows with "drop" in the column `reviewed` of the table go to quarantine, all rows of the findings `drop`, and those
    that were dropped before, but for rows with "keep".
    """
    require_possible(drop, about.get("cannot", {}))
    if about["sha256"] is None:
        raise SettingsError(
            f"{record.parent} has the audit of a set without its source rows, so there is no file to part; "
            "audit it with --data FILE, or name its findings to examples/llama_factory.py or examples/axolotl_plugin.py"
        )
    clean, quarantine, count = folder / CLEAN_FILE, folder / QUARANTINE_FILE, about["rows"]
    source, dropped = _source(about, clean, quarantine), dict[int, bool]()
    if table is not None:
        with writing(clean, quarantine):
            reading(table)
        for line in _filled(table, ("row", "reviewed"), encoding or about.get("hints", {}).get("encoding")):
            word = str(line.cells.get("reviewed") or "").strip().lower()
            if word not in DROP | KEEP:
                raise DataError(f"{line.place}: column 'reviewed' holds {word!r}; write drop, or leave it empty")
            if word:  # a row without a word is in doubt and left as it is, and a row has a line a finding
                if (row := _number(line, "row")) >= count:
                    raise DataError(f"{line.place}: {source.name} has no row {row}; its rows are numbered from 0")
                dropped[row] = word in DROP or dropped.get(row, False)
    before = {*about.get("dropped", ())}
    gone = before | {place for one in about["findings"] if one["name"] in drop for place in one["places"]}
    gone = {row for row in gone | {*dropped} if dropped.get(row, True)}
    copy_rows(source, clean, np.array(sorted({*range(count)} - gone), np.int64))
    copy_rows(source, quarantine, np.array(sorted(gone), np.int64))
    write_json(record, {**about, "dropped": sorted(gone)})
    files = {"out": str(folder), "clean": str(clean), "quarantine": str(quarantine)}
    return {**files, "rows": count, "dropped": len(gone), "dropped_before": len(before & gone)}


def _correct(about: Mapping[str, Any], table: Path, folder: Path, encoding: str | None) -> dict[str, Any]:
    """Write corrected.EXT, in the format of the audited file, and trusted.jsonl, the rows with a reviewed label.

    The field `reviewed_as` of a trusted row is "suspect", or "check" where it was drawn at random. Rows of images or
    recordings become corrected.jsonl, with absolute paths.
    """
    kind = KINDS[about.get("answer", CLASS.name)]
    needed = ("row", *(["token"] if kind.by_token else []), "label", "reviewed_label")
    filled = _filled(table, needed, encoding or about["hints"].get("encoding"))
    # A label is in any spelling of its class, or as suspects.csv writes it.
    class_of, written = class_finder(about["classes"]), {_as_cell(str(label)): label for label in about["classes"]}

    def find(text: str) -> Label | None:
        return written.get(text) if (label := class_of(text)) is None else label

    reviewed, unread = _read(filled, about["classes"], find, several=kind.joint, tags=kind.by_token)
    trusted = folder / TRUSTED_FILE
    source = _source(about, folder / "corrected.jsonl", trusted)  # the copy of several files, which are read here
    columns = Columns(**about["columns"])
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
    corrected = folder / f"corrected{'.jsonl' if source.path is None else source.path.suffix.lower()}"
    with writing(corrected, trusted):
        for path in (table, about["source"]):
            reading(path)
    folder.mkdir(parents=True, exist_ok=True)
    copy_rows(source, corrected, cells=changed)
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
    words = list[str]()
    for name, value in ((name, value) for name, value in settings.items() if value):
        plain = False
        with suppress(YamlProblem):
            plain = load_yaml(value) == value
        words += ["--set", f"{name}={value if plain else json.dumps(value, ensure_ascii=False)}"]
    return " ".join(map(quote, ("tsqlora", "train", "--model", "M", "--data", str(corrected), *words)))


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


def _read(
    filled: Table, classes: Sequence[Label], find: Find, *, several: bool, tags: bool
) -> tuple[list[Reviewed], set[int]]:
    """The rows of the table with a reviewed label, by row; and the rows with a tag that was not reviewed."""
    by_row, unread = dict[tuple[int, int], Reviewed](), set[int]()
    for line in filled:
        cells = line.cells
        if is_missing(cells.get("reviewed_label")):
            unread |= {_number(line, "row")} if tags else set()
            continue
        row, labels = _number(line, "row"), list[Label]()
        for part in _parts(str(cells["reviewed_label"]), several=several):
            if (label := find(part)) is None:
                part, choices = part.strip(), {*map(str, classes)}
                if len(choices) > SHOWN:
                    near = difflib.get_close_matches(part, choices, n=5, cutoff=0.5)
                    choices = {*(near or sorted(choices)[:SHOWN])}
                why = f"row {row} has the reviewed_label {part!r}, not a class; {nearest(part, choices)}"
                raise DataError(f"{line.place}: {why}")
            labels.append(label)
        token, reviewed = _number(line, "token") if tags else None, labels if several else labels[0]
        one = Reviewed(line.place, row, str(cells["label"]), reviewed, cells.get("kind") == "check", token)
        if by_row.setdefault((row, token or 0), one).reviewed != reviewed:
            raise DataError(f"{line.place}: row {row} has two different reviews; remove one")
    if not by_row:
        raise DataError(f"no row of {filled.name} has a reviewed_label; fill in the right label where you are sure")
    return [by_row[key] for key in sorted(by_row)], unread


def _number(row: Row, column: str) -> int:
    number = str(row.cells[column]).strip()
    if not number.isdecimal():
        raise DataError(f"{row.place}: {column} {number!r} is not a {column} number; restore the column {column}")
    return int(number)


def _parts(cell: Any, *, several: bool) -> list[str]:
    return [cell if isinstance(part, list) else str(part) for part in split_labels(cell)] if several else [cell]


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
