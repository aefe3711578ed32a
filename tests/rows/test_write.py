"""What is written reads back; what a format cannot hold is refused; no cell is a formula."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tables import cells_of
from tsqlora.errors import DataError, SettingsError
from tsqlora.rows.write import WRITERS, without_formulas, write_rows

ROWS = [{"text": 'a "quoted", line\nand another', "label": "x"}, {"text": "tab\tand ünïcode 文字 🙂", "label": "y"}]


@pytest.mark.parametrize("extension", sorted(WRITERS))
def test_rows_read_back_as_they_were_written(extension: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"rows{extension}"
    write_rows(path, ROWS)
    assert list(cells_of(path)) == ROWS
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_types_survive_where_the_format_has_them(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "p": 0.5}, {"text": "b", "label": None, "p": 1.0}]
    for name in ("r.jsonl", "r.parquet"):
        write_rows(tmp_path / name, rows)
        assert list(cells_of(tmp_path / name)) == rows


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
    assert list(cells_of(path)) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_carriage_return_in_a_cell_is_no_end_of_a_line(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": "0\r", "b": "x"}, {"a": "", "b": "\r"}]
    write_rows(tmp_path / f"t{suffix}", rows)
    assert list(cells_of(tmp_path / f"t{suffix}")) == rows


@pytest.mark.parametrize(
    ("suffix", "value"), [(".parquet", 2**70), (".parquet", {}), (".csv", "\ud800"), (".tsv", "\ud800")]
)
def test_what_a_format_cannot_hold_is_an_error_and_nothing_is_written(suffix: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"write \.jsonl"):
        write_rows(tmp_path / f"a{suffix}", [{"text": value}])
    assert not list(tmp_path.iterdir())
    write_rows(tmp_path / "a.jsonl", [{"text": value}])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": value}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("value", [[{"role": "user", "content": "Hi"}], {"a": 1}, {}, [["joy"]], ("a", "b")])
def test_a_nested_value_does_not_fit_into_a_cell(value: Any, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2, column 'chat'.*write \.jsonl"):
        write_rows(tmp_path / f"a{suffix}", [{"text": "a", "chat": "b"}, {"text": "a", "chat": value}])
    assert not list(tmp_path.iterdir())


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
