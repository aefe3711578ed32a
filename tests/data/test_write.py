"""What is written reads back, whole or not at all."""

from pathlib import Path

import pytest

from tsqlora.data.rows import read_rows
from tsqlora.data.write import WRITERS, write_rows
from tsqlora.errors import DataError, SettingsError

ROWS = [
    {"text": 'a "quoted", line\nand another', "label": "x"},
    {"text": "tab\tand ünïcode 文字 🙂", "label": "y"},
]


@pytest.mark.parametrize("extension", sorted(WRITERS))
def test_rows_read_back_as_they_were_written(extension: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"rows{extension}"
    write_rows(path, ROWS)
    assert list(read_rows(path).rows) == ROWS
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_types_survive_where_the_format_has_them(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "p": 0.5}, {"text": "b", "label": None, "p": 1.0}]
    for name in ("r.jsonl", "r.parquet"):
        write_rows(tmp_path / name, rows)
        assert list(read_rows(tmp_path / name).rows) == rows


def test_columns_are_those_that_some_row_has(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.csv", [{"a": "1"}, {"b": "2", "a": "3"}])
    assert (tmp_path / "r.csv").read_text() == "a,b\n1,\n3,2\n"


def test_an_unknown_extension_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'\.txt'.*\.jsonl, \.csv, \.tsv, \.parquet"):
        write_rows(tmp_path / "r.txt", ROWS)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "r.csv").mkdir()
    with pytest.raises(SettingsError, match=r"r\.csv"):
        write_rows(tmp_path / "r.csv", ROWS)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_rows(path, ROWS)
    with pytest.raises(DataError, match=r"write \.jsonl"):
        write_rows(path, [{"a": 1}, {"a": "text"}])
    assert list(read_rows(path).rows) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_carriage_return_in_a_cell_is_no_end_of_a_line(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": "0\r", "b": "x"}, {"a": "", "b": "\r"}]
    write_rows(tmp_path / f"t{suffix}", rows)
    assert list(read_rows(tmp_path / f"t{suffix}").rows) == rows
