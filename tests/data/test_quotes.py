"""Quotes that a writer did not double: read as they can only be meant, else refused with their line."""

import csv
import random
from pathlib import Path

import pytest

from tables import cells_of
from tsqlora.data.readers import Hints
from tsqlora.data.sources import open_table
from tsqlora.errors import DataError

LONE = 'she said "no" twice'


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("all_enclosed", [True, False])
def test_one_quote_that_is_not_doubled_changes_no_other_row(all_enclosed: bool, tmp_path: Path) -> None:
    """Before, quotes then belonged to all texts: two classes became three."""
    around = '"' if all_enclosed else ""
    rows = [(f"row {j} of the table", "pos" if j % 2 else "neg") for j in range(200)]
    rows[70] = (LONE, "pos")
    lines = [f"{around}text{around},{around}label{around}", *(f'"{a}",{around}{b}{around}' for a, b in rows)]
    path = write(tmp_path / "t.csv", lines)
    with pytest.warns(UserWarning, match=r"t\.csv:72: a quote inside a field"):
        assert [tuple(row.values()) for row in cells_of(path)] == rows


def test_a_quote_that_may_end_its_field_is_an_error_with_its_line(tmp_path: Path) -> None:
    lines = ["text,label", '"a, b","x"', '"he said "no", twice","y"', *(f'"row {j}","x"' for j in range(9))]
    with pytest.raises(DataError, match=r"t\.csv:3"), pytest.warns(UserWarning, match=r"t\.csv:3"):
        open_table(write(tmp_path / "t.csv", lines))
    lines[2] = '"a "b","x"'
    with pytest.warns(UserWarning, match=r"t\.csv:3"):
        assert cells_of(write(tmp_path / "t.csv", lines))[1] == {"text": 'a "b', "label": "x"}


@pytest.mark.parametrize("escapes_itself", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_quotes_behind_backslashes_are_read_as_they_were(escapes_itself: bool, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    words = ["plain", '"no"', '5"', "it's", "a, b", "end\\n" if escapes_itself else r"C:\new", ""]
    rows = [(" ".join(rng.choices(words, k=rng.choice([1, 2, 30]))) or "x", rng.choice("ab")) for _ in range(60)]
    rows[0] = ('she said "no" twice', "a")
    rows[1] = (r"C:\new day", "b") if not escapes_itself else ("two\nlines", "b")
    path = tmp_path / "t.csv"
    if escapes_itself:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, doublequote=False, escapechar="\\", quoting=rng.choice([0, 1]))
            writer.writerows([("text", "label"), *rows])
    else:
        write(path, ["text,label", *('"{}",{}'.format(a.replace('"', '\\"'), b) for a, b in rows)])
    assert [tuple(row.values()) for row in cells_of(path)] == rows


def test_a_file_of_speech_in_quotes_stays_literal(tmp_path: Path) -> None:
    texts = [f'"Well" said {j}, he' if j % 3 else f"plain {j}" for j in range(60)]
    texts[5] = '"All of it."'
    path = write(tmp_path / "t.tsv", ["text\tlabel", *(f"{text}\tx" for text in texts)])
    assert [row["text"] for row in cells_of(path)] == texts


def test_a_file_that_is_both_is_asked_for(tmp_path: Path) -> None:
    lines = ["text,label", *(f'"row {j}",x' if j % 4 == 0 else f"row {j},x" for j in range(40)), '"a" b,x']
    with pytest.raises(DataError, match=r"t\.csv:42: .*data\.quoting"):
        open_table(write(tmp_path / "t.csv", lines))
    assert len(open_table(tmp_path / "t.csv", hints=Hints(quoting="literal"))) == 41
