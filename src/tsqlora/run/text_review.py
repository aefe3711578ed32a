"""`tsqlora audit --apply` of text: part the audited rows into clean.jsonl and quarantine.jsonl."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.readers import Hints
from tsqlora.data.sources import open_table
from tsqlora.data.write import can_copy, copy_rows, write_rows
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import reading, write_json, writing
from tsqlora.run.audit import source_digest
from tsqlora.run.text_audit import FINDINGS_FILE
from tsqlora.text.findings import require_possible

CLEAN_FILE, QUARANTINE_FILE = "clean.jsonl", "quarantine.jsonl"
DROP = {"drop", "remove", "x", "bad", "quarantine", "no"}
KEEP = {"", "keep", "ok", "yes", "good"}


def is_text_audit(folder: Path) -> bool:
    """Whether a folder holds the audit of a text file."""
    return (folder / FINDINGS_FILE).is_file()


def apply_text_review(out: Path, reviewed: Path | None = None, drop_findings: Collection[str] = ()) -> dict[str, Any]:
    """Write each row of the audited file to one of the two files, byte for byte where it is JSON lines.

    Rows with "drop" in the column `reviewed` of the table go to quarantine, all rows of `drop_findings`, and those that
    were dropped before, but for rows with "keep". Raises SettingsError for a finding that no row can have and for an
    audit without a file of rows, DataError for another word or row, and if the file has changed since its audit.
    """
    about = json.loads((out / FINDINGS_FILE).read_text(encoding="utf-8"))
    require_possible(drop_findings, about.get("cannot", {}))
    if about["sha256"] is None:
        raise SettingsError(
            f"{out} has the audit of a set without its source rows, so there is no file to part; "
            "audit it with --data FILE, or name its findings to examples/llama_factory.py or examples/axolotl_plugin.py"
        )
    clean, quarantine = out / CLEAN_FILE, out / QUARANTINE_FILE
    with writing(clean, quarantine):
        if reviewed is not None:
            reading(reviewed)
        table = open_table(about["source"], split="train", hints=Hints(**about.get("hints", {})))
    if about["sha256"] is not None and source_digest(table) != about["sha256"]:
        raise DataError(f"{about['source']} has changed since its audit; audit it again")
    before = {*about.get("dropped", ())}
    words = {} if reviewed is None else _reviewed(reviewed, about["rows"])
    dropped = before | {place for one in about["findings"] if one["name"] in drop_findings for place in one["places"]}
    dropped = {row for row in dropped | {*words} if words.get(row, True)}
    for path, rows in ((clean, sorted({*range(about["rows"])} - dropped)), (quarantine, sorted(dropped))):
        if table.path is not None and can_copy(table.path, path):
            copy_rows(table.path, path, np.array(rows, np.int64), table.dialect)
        else:
            chosen = {*rows}
            write_rows(path, [row.cells for row in table if row.id in chosen])
    write_json(out / FINDINGS_FILE, {**about, "dropped": sorted(dropped)})
    files = {"out": str(out), "clean": str(clean), "quarantine": str(quarantine)}
    return {**files, "rows": about["rows"], "dropped": len(dropped), "dropped_before": len(before & dropped)}


def _reviewed(reviewed: Path, count: int) -> dict[int, bool]:
    """Whether a reviewed table drops a row, by row; a row without a word is in doubt and left as it is."""
    table, dropped = open_table(reviewed), dict[int, bool]()
    if lacking := [name for name in ("row", "reviewed") if name not in table.names]:
        raise DataError(
            f"{table.name} has no column '{lacking[0]}'; give the table of an audit, or the export of its page"
        )
    for line in table:
        word, row = str(line.cells.get("reviewed") or "").strip().lower(), line.cells.get("row")
        if word not in DROP | KEEP:
            raise DataError(f"{line.place}: column 'reviewed' holds {word!r}; write drop, or leave it empty")
        if word:
            if not str(row).isdigit() or int(str(row)) >= count:
                raise DataError(f"{line.place}: column 'row' holds {row!r}; rows are 0 to {count - 1:,}")
            dropped[int(str(row))] = word in DROP or dropped.get(int(str(row)), False)  # a row has a line a finding
    return dropped
