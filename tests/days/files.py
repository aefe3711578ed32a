"""Files as people keep rows in them: every reader that there is, shards and folders too."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from days.labels import FLAT_LABELS, LONE, MEDIA
from days.rows import FLAT

Rows = Sequence[Mapping[str, Any]]


def _lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1), encoding="utf-8")


def _wrapped(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps({"data": list(rows)}), encoding="utf-8")


def columns_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _delimited(delimiter: str) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            quoting = (
                csv.QUOTE_ALL if any(LONE in str(cell) for row in rows for cell in row.values()) else csv.QUOTE_MINIMAL
            )
            writer = csv.DictWriter(file, columns_of(rows), delimiter=delimiter, quoting=quoting)
            writer.writeheader()
            writer.writerows([{name: row.get(name) for name in columns_of(rows)} for row in rows])
        text = path.read_bytes().decode()  # with the line ends inside cells
        path.write_bytes(text.replace(f'""{LONE}', '"').replace(f'{LONE}""', '"').encode())

    return write


def table_of(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in columns_of(rows)} for row in rows])


def _parquet(path: Path, rows: Rows) -> None:
    pq.write_table(table_of(rows), path)


def _zipped(write: Callable[[Path, Rows], None]) -> Callable[[Path, Rows], None]:
    def written(path: Path, rows: Rows) -> None:
        plain = path.with_suffix("")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return written


def _shards(path: Path, rows: Rows) -> None:
    path.mkdir()
    parts = [part for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if part]
    schema = table_of(rows)
    start = 0
    for j, part in enumerate(parts):
        pq.write_table(schema.slice(start, len(part)), path / f"train-{j:05d}-of-{len(parts):05d}.parquet")
        start += len(part)


def _hub_folder(path: Path, rows: Rows) -> None:
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n", encoding="utf-8")
    _lines(path / "data" / "train.jsonl", rows)


def _saved(path: Path, rows: Rows) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset(table_of(rows)).save_to_disk(str(path))


def _book(*others: str) -> Callable[[Path, Rows], None]:
    """A spreadsheet of the rows, and other sheets."""

    def write(path: Path, rows: Rows) -> None:
        import openpyxl  # pyright: ignore[reportMissingModuleSource]

        book = openpyxl.Workbook()
        sheet = book.active
        assert sheet is not None
        sheet.title = SHEET
        sheet.append(columns_of(rows))
        for row in rows:
            sheet.append([row.get(name) for name in columns_of(rows)])
        for cell in (cell for line in sheet.iter_rows() for cell in line if str(cell.value).startswith("=")):
            cell.data_type = "s"  # a text, and no formula
        for name in others:
            book.create_sheet(name).append(["made by", "hand"])
        book.save(path)

    return write


SHEET = "Rows"
FILES: dict[str, tuple[str, Callable[[Path, Rows], None]]] = {
    "jsonl": ("rows.jsonl", _lines),
    "json": ("rows.json", _array),
    "json in data": ("rows.json", _wrapped),
    "jsonl.gz": ("rows.jsonl.gz", _zipped(_lines)),
    "csv": ("rows.csv", _delimited(",")),
    "semicolons": ("rows.csv", _delimited(";")),
    "tsv": ("rows.tsv", _delimited("\t")),
    "csv.gz": ("rows.csv.gz", _zipped(_delimited(","))),
    "parquet": ("rows.parquet", _parquet),
    "shards": ("rows", _shards),
    "saved": ("saved", _saved),
    "hub folder": ("hub", _hub_folder),
    "sheet": ("rows.xlsx", _book()),
    "sheets": ("rows.xlsx", _book("About")),
}
"""By name: the file or folder, and what writes it."""
DELIMITED = ("csv", "semicolons", "tsv", "csv.gz", "sheet", "sheets")
ARROW = ("parquet", "shards", "saved")
"""Files whose messages all have the keys of all."""


def holds(file: str, kind: str) -> bool:
    """Whether people keep rows of a kind in such a file."""
    if kind in MEDIA:
        return file == "jsonl"
    if file in ("sheet", "sheets") and find_spec("openpyxl") is None:
        return False
    return file not in DELIMITED or kind in (*FLAT, *FLAT_LABELS)


def options_of(file: str) -> tuple[str, ...]:
    """What a command must say about such a file."""
    return ("--set", f"data.sheet={SHEET}") if file == "sheets" else ()


def save(file: str, folder: Path, rows: Rows) -> Path:
    """Write the rows as such a file, and return its path."""
    name, write = FILES[file]
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    write(path, rows)
    return path
