"""Files of rows of strangers: what is doubled, compressed, broken or no file at all is told, and no other is read."""

import gzip
import json
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsqlora.data.rows import read_rows
from tsqlora.data.write import without_formulas, write_rows
from tsqlora.errors import DataError


def test_an_archive_is_told_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}'))
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("b.csv", "text\na\n")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(DataError, match=rf"{name}.*compressed"):
            read_rows(tmp_path / name)


def test_nul_and_every_line_end_in_a_csv_are_cells_and_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\r\na\0b,1\nc,2\r"d\re",3\r\n')
    assert [row["text"] for row in read_rows(tmp_path / "a.csv").rows] == ["a\0b", "c", "d\re"]


def test_a_line_of_a_hundred_megabytes_is_a_row(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write('{"text": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}\n')
    assert len(read_rows(tmp_path / "a.jsonl").rows[0]["text"]) == 100_000_000


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
def test_a_value_that_python_does_not_have_is_told(column: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_rows(tmp_path / "a.parquet")


def test_a_column_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"naive": ["x"]}), tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"naive", b"na\xffve"))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("source", ["csv", "text", "imagefolder"])
def test_the_name_of_a_kind_of_file_takes_no_files_that_happen_to_lie_here(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private.csv").write_text("text,label\nsecret,1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=source):
        read_rows(source)


@pytest.mark.parametrize(
    ("suffix", "value"),
    [(".parquet", 2**70), (".parquet", {}), (".csv", "\ud800"), (".tsv", "\ud800")],
)
def test_what_a_format_cannot_hold_is_told_and_nothing_is_written(suffix: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"write \.jsonl"):
        write_rows(tmp_path / f"a{suffix}", [{"text": value}])
    assert not list(tmp_path.iterdir())
    write_rows(tmp_path / "a.jsonl", [{"text": value}])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": value}


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", " =1", "=cmd|' /C calc'!A0", "＝1"]
)
def test_no_cell_begins_like_a_formula(text: str) -> None:
    rows, changed = without_formulas([{"text": text, "label": "a"}, {"text": "fine", text: "x"}])
    assert rows == [{"text": f"'{text}", "label": "a"}, {"text": "fine", f"'{text}": "x"}]
    assert changed == 2


@pytest.mark.parametrize("value", ["-1.5", "+3e4", "a=b", "'=1", "", -1, 0.5, None, True, date(2026, 1, 1)])
def test_what_is_no_formula_stays_as_it_is(value: Any) -> None:
    assert without_formulas([{"text": value}]) == ([{"text": value}], 0)
