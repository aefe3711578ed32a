"""`tsqlora apply`: the rows of a reviewed audit, corrected and trusted, or of text clean and quarantined."""

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
from tsqlora.rows.labels import CLASS, KINDS, LabelKind, are_numbers, class_finder, join_labels, split_labels
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
Read = Callable[[str], list[tuple[str, Label | None]]]
"""Reads the labels of a text, each with its class."""


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
    kind, columns, trusted = KINDS[about.get("answer", CLASS.name)], Columns(**about["columns"]), folder / TRUSTED_FILE
    needed = ("row", *(["token"] if kind.by_token else []), "label", "reviewed_label")
    filled = _filled(table, needed, encoding or about["hints"].get("encoding"))
    lines = [line for line in filled if not is_missing(line.cells.get("reviewed_label"))]
    if not lines:
        raise DataError(f"no row of {filled.name} has a reviewed_label; fill in the right label where you are sure")
    source = _source(about, folder / "corrected.jsonl", trusted)  # the copy of several files, which are read here
    opened = source.numbered() if are_numbers(about["classes"]) else source
    source, column = opened.using(columns), columns.label
    ids = np.intersect1d(source.ids, [_number(line, "row") for line in lines])
    rows = {row.id: row.cells for row in replace(source, ids=ids)}
    new, marks = _corrections(lines, rows, columns, kind, about["classes"], source.name)
    if columns.one_hot:  # the column of labels is not in the file
        source = opened
        rows = {row: {name: cell for name, cell in cells.items() if name != column} for row, cells in rows.items()}
    changed = {row: own for row, own in new.items() if rows[row] | own != rows[row]}
    corrected = folder / f"corrected{'.jsonl' if source.path is None else source.path.suffix.lower()}"
    with writing(corrected, trusted):
        for path in (table, about["source"]):
            reading(path)
    folder.mkdir(parents=True, exist_ok=True)
    copy_rows(source, corrected, cells=changed)
    tags = (line for line in (filled if kind.by_token else ()) if is_missing(line.cells.get("reviewed_label")))
    unread = {_number(line, "row") for line in tags}
    whole = [row for row in sorted(new) if row not in unread]
    # The loss of suspects, which are hard rows, does not show what the pool teaches.
    kinds = {row: mark for (row, _), mark in sorted(marks.items())}
    write_rows(trusted, [rows[row] | new[row] | {REVIEWED_AS: kinds[row]} for row in whole or sorted(new)])
    partly = f"no row has all its listed tags reviewed, so {TRUSTED_FILE} has {len(new)} that are reviewed in part"
    both = [(rows[row][column], own[column]) for row, own in changed.items()] if kind.by_token and column else []
    return {
        "out": str(folder),
        "corrected": str(corrected),
        "trusted": str(trusted),
        "reviewed": len(marks),
        "changed": sum(a != b for pair in both for a, b in zip(*pair, strict=True)) or len(changed),  # in labels
        "checks": sum(mark == "check" for mark in marks.values()),
        "notes": [] if whole else [partly],
        "next": _training(about, corrected, trusted),
    }


def _corrections(
    lines: Sequence[Row],
    rows: Mapping[int, dict[str, Any]],
    columns: Columns,
    kind: LabelKind,
    classes: Sequence[Label],
    name: str,
) -> tuple[dict[int, dict[str, Any]], dict[tuple[int, int], str]]:
    """The new cells of each row with a reviewed label; and what each label, by row and token, was reviewed as.

    Raises DataError for lines that contradict each other, or the label that the rows have in the file of this name.
    """
    read, column = _reader(classes, several=kind.joint), str(columns.label)
    new, marks = dict[int, dict[str, Any]](), dict[tuple[int, int], str]()
    reviewed = dict[tuple[int, int], list[Label]]()
    for line in lines:
        row, token = _number(line, "row"), _number(line, "token") if kind.by_token else 0
        if row not in rows:
            raise DataError(f"{line.place}: {name} has no row {row}; its rows are numbered from 0")
        cell, labels = rows[row].get(column), _reviewed(line, row, read, classes)
        if kind.by_token:
            cell = cell[token] if isinstance(cell, list) and token < len(cell) else ""
        own, named = str(join_labels(split_labels(cell) if kind.joint else cell)), str(line.cells["label"])
        theirs, ours = ([part if label is None else label for part, label in read(text)] for text in (named, own))
        if theirs != ours and named != _as_cell(own):
            raise DataError(
                f"{line.place}: row {row} has the label {named!r} here and {own!r} in {name}; give the table of this "
                "audit, with its columns row and label unchanged"
            )
        if reviewed.setdefault((row, token), labels) != labels:
            raise DataError(f"{line.place}: row {row} has two different reviews; remove one")
        marks.setdefault((row, token), "check" if line.cells.get("kind") == "check" else "suspect")
        written = _as_written(labels if kind.joint else labels[0], cell)
        if columns.one_hot:
            new[row] = {one: _as_flag(one in labels, rows[row][one]) for one in columns.one_hot}
        elif kind.by_token:
            tags = new.get(row, rows[row])[column]
            new[row] = {column: [*tags[:token], written, *tags[token + 1 :]]}
        else:
            new[row] = {column: written}
    return new, marks


def _reader(classes: Sequence[Label], *, several: bool) -> Read:
    """Return what reads the labels of a text in any spelling, or as suspects.csv writes it."""
    class_of, written = class_finder(classes), {_as_cell(str(label)): label for label in classes}

    def read(text: str) -> list[tuple[str, Label | None]]:
        parts = [text if isinstance(part, list) else str(part) for part in split_labels(text)] if several else [text]
        return [(one, written.get(one) if (label := class_of(one)) is None else label) for one in parts]

    return read


def _reviewed(line: Row, row: int, read: Read, classes: Sequence[Label]) -> list[Label]:
    """The reviewed labels of a line.  Raises DataError for one that is no class."""
    labels = list[Label]()
    for part, label in read(str(line.cells["reviewed_label"])):
        if label is None:
            part, choices = part.strip(), {*map(str, classes)}
            if len(choices) > SHOWN:
                near = difflib.get_close_matches(part, choices, n=5, cutoff=0.5)
                choices = {*(near or sorted(choices)[:SHOWN])}
            why = f"row {row} has the reviewed_label {part!r}, not a class; {nearest(part, choices)}"
            raise DataError(f"{line.place}: {why}")
        labels.append(label)
    return labels


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
    if isinstance(reviewed, int) and str(cell).strip().endswith(".0"):
        return type(cell)(f"{reviewed}.0")
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


def _number(row: Row, column: str) -> int:
    number = str(row.cells[column]).strip()
    if not number.isdecimal():
        raise DataError(f"{row.place}: {column} {number!r} is not a {column} number; restore the column {column}")
    return int(number)


def _as_cell(text: str) -> str:
    return str(without_formulas([{"label": text}])[0][0]["label"])
