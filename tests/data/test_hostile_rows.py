"""Broken, compressed and hostile files are errors that name the file, and no other file is read."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tables import cells_of
from tsqlora.data.sources import open_table
from tsqlora.errors import DataError


def test_an_archive_is_named_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}'))
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("b.csv", "text\na\n")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(DataError, match=rf"{name}.*compressed"):
            open_table(tmp_path / name)


def test_nul_and_every_line_end_in_a_csv_are_cells_and_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\r\na\0b,1\nc,2\r"d\re",3\r\n')
    assert [row["text"] for row in cells_of(tmp_path / "a.csv")] == ["a\0b", "c", "d\re"]


def test_a_line_of_a_hundred_megabytes_is_a_row(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write('{"text": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}\n')
    assert len(cells_of(tmp_path / "a.jsonl")[0]["text"]) == 100_000_000


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"\xff"], pa.binary()).view(pa.string()),
        pa.array([2**31 - 1], pa.int32()).view(pa.date32()),
        pa.array([10**13], pa.int64()).view(pa.timestamp("s")),
        pa.array([0], pa.int64()).view(pa.timestamp("s", "Mars/Phobos")),
    ],
    ids=["text", "date", "time", "zone"],
)
def test_a_value_that_python_does_not_have_is_named(column: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        cells_of(tmp_path / "a.parquet")


def test_a_column_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"naive": ["x"]}), tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"naive", b"na\xffve"))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_table(tmp_path / "a.parquet")


@pytest.mark.parametrize("source", ["csv", "text", "imagefolder"])
def test_the_name_of_a_kind_of_file_takes_no_files_that_happen_to_lie_here(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private.csv").write_text("text,label\nsecret,1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=source):
        open_table(source)
