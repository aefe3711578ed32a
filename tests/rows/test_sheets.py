"""Spreadsheets: cells as they show them, and the sheet that has the rows."""

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from tables import cells_of
from tsqlora.errors import DataError, SettingsError
from tsqlora.rows.readers import Hints
from tsqlora.rows.sources import first_rows, open_table, require_source
from tsqlora.rows.write import copy_rows


def save(path: Path, **sheets: Iterable[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_cells_are_text_as_the_sheet_shows_them(tmp_path: Path) -> None:
    day, moment = datetime.datetime(2026, 5, 1), datetime.datetime(2026, 5, 1, 12, 30)
    rows = [["text", "label", None], ['say "no", or\nnot', "01", None], [], ["été 語", 7], [3, True], [day, 0.1 + 0.2]]
    path = save(tmp_path / "t.xlsx", Rows=[*rows, [moment, None]], Sheet2=[])
    book = openpyxl.load_workbook(path)
    book["Rows"]["B4"].number_format = "000"
    book.save(path)
    shown = [('say "no", or\nnot', "01"), ("été 語", "007"), ("3", "TRUE"), ("2026-05-01", "0.3"), (str(moment), "")]
    table = open_table(path)
    assert [tuple(row.cells.values()) for row in table] == shown
    assert [row.number for row in table] == [2, 4, 5, 6, 7]
    assert (table.typed, table.names) == (False, ("text", "label"))
    copy_rows(table, tmp_path / "corrected.jsonl", cells={1: {"label": "x"}})
    assert [tuple(row.values()) for row in cells_of(tmp_path / "corrected.jsonl")][1] == ("été 語", "x")


def test_of_several_sheets_with_rows_one_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "t.xlsx", **{"My rows": [["text"], ["a"]], "Old": [["text"], ["b"]], "Empty": [[None]]})
    with pytest.raises(DataError, match=r"add --set data.sheet='My rows', or another of 'My rows', 'Old'"):
        open_table(path)
    assert cells_of(path, hints=Hints(sheet="Old")) == ({"text": "b"},)
    assert first_rows(path, Hints(sheet="Old")) == [{"text": "b"}]
    with pytest.raises(DataError, match="no sheet 'New'"):
        open_table(path, hints=Hints(sheet="New"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["text"], ["=1+1"]], "t.xlsx:2: cell A2 has a formula without a value"),
        ([["text", None], ["a", "b"]], "t.xlsx:2: 2 fields, but the header has 1"),
        ([["text", None, None, "label"], ["a", "b"]], "t.xlsx:2: a value in one of 2 columns without a name"),
        ([["text", "text"], ["a", "b"]], "two columns are named 'text'"),
        ([["text"]], "has no rows"),
        ([], "has no rows"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(rows: list[list[Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_table(save(tmp_path / "t.xlsx", Rows=rows))
    assert message in str(caught.value)


def test_a_missing_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqlora.rows.sources.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'tsqlora\[excel\]'"):
        require_source(save(tmp_path / "t.xlsx", Rows=[["text"], ["a"]]))
