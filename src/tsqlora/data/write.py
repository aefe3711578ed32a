"""Rows -> a file, in the format that its extension names."""

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.errors import SettingsError

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows whole or not at all; the directory is made if need be.

    Raises SettingsError for an extension that is not in WRITERS.
    """
    require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    WRITERS[path.suffix.lower()](temporary, rows)
    os.replace(temporary, path)


def require_writable(path: Path) -> None:
    """Raises SettingsError for an extension in which rows cannot be written."""
    if path.suffix.lower() not in WRITERS:
        raise SettingsError(f"--out {path}: unknown extension '{path.suffix}'; known: {', '.join(WRITERS)}")


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def _write_csv(path: Path, rows: Sequence[Row], *, delimiter: str = ",") -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _names(rows), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_tsv(path: Path, rows: Sequence[Row]) -> None:
    _write_csv(path, rows, delimiter="\t")


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    names = _names(rows)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)


def _names(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".parquet": _write_parquet,
}
