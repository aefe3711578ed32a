"""What was written is read back, however it was written; what cannot be read is an error that names file and line."""

import csv
import gzip
import json
import random
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tables import cells_of
from tsqlora.errors import DataError
from tsqlora.rows import table as table_module
from tsqlora.rows.readers import COMPRESSED, DELIMITERS, SHEETS, SNIFF, SUFFIXES, Hints, sniff
from tsqlora.rows.sources import open_table

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# A record of one empty cell is a blank line; two columns keep every record visible.
TABLES = st.lists(st.fixed_dictionaries({"text": TEXT, "label": TEXT}), min_size=1, max_size=8)
ON_FILES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, text: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def write_as(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl" | ".ndjson":
            return write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        case ".json":
            return write(path, json.dumps(rows, ensure_ascii=False, indent=1))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def error(source: str | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_table(source, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


def tuples(path: Path, **options: Any) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in cells_of(path, **options)]


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != SHEETS])
@given(rows=TABLES)
@ON_FILES
def test_what_was_written_is_read_back_whatever_the_format(
    suffix: str, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    path = write_as(tmp_path / f"t{suffix}", rows)
    assert list(cells_of(path, hints=Hints(quoting="quoted"))) == rows


PRICES = [("Preis 3,50 Euro, günstig", "gut"), ("a, b; it's", "schlecht")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_rows_are_the_same_however_a_table_is_written(delimiter: str, encoding: str, tmp_path: Path) -> None:
    lines = [f"text{delimiter}label", *(f'"{text}"{delimiter}"{label}"' for text, label in PRICES)]
    path = write(tmp_path / "t.csv", "\n".join(lines), encoding)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuples(path) == PRICES
    assert [str(path) in str(w.message) for w in caught] == [True] * (encoding == "cp1252")


@given(texts=st.lists(st.text("ab,;|'\t", max_size=9), min_size=1, max_size=9))
@ON_FILES
def test_a_table_with_commas_in_its_header_alone_stays_one_with_commas(texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "text,label\n" + "".join(f'"{text}",1\n' for text in texts))
    assert sniff(path, SNIFF).delimiter == ","


@pytest.mark.parametrize(
    ("name", "text", "rows", "numbers"),
    [
        ("t.csv", "text,label\n12,3\n", [("12", "3")], [2]),
        ("t.csv", "text, as written;label\na;0\nb, c;1\n", [("a", "0"), ("b, c", "1")], [2, 3]),
        ("t.csv", "text,label\n\na,0\n\n\nb,1\n", [("a", "0"), ("b", "1")], [3, 6]),
        ("t.csv", 'text\r\na\r\n""\r\n\r\n', [("a",), ("",)], [2, 3]),
        ("t.csv", "text;label;;\na;0;;\n", [("a", "0", "")], [2]),
        ("t.csv", 'a,b\r\n"two\nlines, ""quoted""",0\r\nb,1\r\n', [('two\nlines, "quoted"', "0"), ("b", "1")], [2, 4]),
        ("t.csv", 'a,b\r\na\0b,1\nc,2\r"d\re",3\r\n', [("a\0b", "1"), ("c", "2"), ("d\re", "3")], [2, 3, 4]),
        ("t.tsv", 'a\tb\n"a\nb"\tx\n', [("a\nb", "x")], [2]),
        ("t.jsonl", '\n{"text": "a"}\r\n  \n\n{"text": "b"}\n\n', [("a",), ("b",)], [2, 5]),
        ("t.jsonl", '{"text": "a\u2028b\x85c"}\n{"text": "d"}', [("a\u2028b\x85c",), ("d",)], [1, 2]),
        ("t.JSONL", '\ufeff{"text": "é"}', [("é",)], [1]),
        ("t.CSV", "\ufefftext\né\n", [("é",)], [2]),
        ("t.json", '\ufeff[{"text": "é"}]', [("é",)], [1]),
        ("t.json", '{"text": "a"}\n{"text": "b"}\n', [("a",), ("b",)], [1, 2]),
        ("t.json", ' [{"text": "a"},\n\n {"text": "b"}]', [("a",), ("b",)], [1, 2]),
        ("t.json", '{"version": 2, "data": [{"text": "a"}]}', [("a",)], [1]),
    ],
)
def test_each_row_has_its_cells_and_its_line(
    name: str, text: str, rows: list[Any], numbers: list[int], tmp_path: Path
) -> None:
    table = open_table(write(tmp_path / name, text))
    assert [tuple(row.cells.values()) for row in table] == rows
    assert [row.number for row in table] == numbers
    assert next(iter(table)).place == f"{tmp_path}/{name}:{numbers[0]}"
    assert table.typed == ("json" in name.lower())


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_typed_formats_keep_types_and_every_column_of_some_row(suffix: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "w": 0.5}, {"text": "b", "label": None, "w": 2.0}]
    table = open_table(write_as(tmp_path / f"t{suffix}", rows))
    assert [row.cells for row in table] == rows
    assert (table.typed, table.names) == (True, ("text", "label", "w"))
    read = open_table(write(tmp_path / "t.jsonl", '{"text": "a"}\n{"label": 1, "text": "b"}'))
    assert read.names == ("text", "label")


def test_chunks_are_the_rows_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.jsonl", "\n\n".join(json.dumps({"text": j}) for j in range(10)))
    for size in (1, 3, 10, 99):
        monkeypatch.setattr(table_module, "CHUNK", size)
        whole = open_table(path)
        parts = list(whole.chunks())
        assert [len(part) for part in parts] == [min(size, 10 - j) for j in range(0, 10, size)]
        assert [row.cells["text"] for part in parts for row in part] == list(range(10))
        some = list(replace(whole, ids=np.array([0, 4, 5, 9])))
        assert [(row.cells["text"], row.id, row.number) for row in some] == [(j, j, 2 * j + 1) for j in (0, 4, 5, 9)]


def test_a_cell_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        assert cells_of(write(tmp_path / "t.csv", f"text\n{'x' * 2000}\n"))[0] == {"text": "x" * 2000}
        error(write(tmp_path / "broken.csv", 'text\n"'))
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_a_line_of_a_hundred_megabytes_is_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "{"x" * 100_000_000}"}}\n')
    assert len(cells_of(path)[0]["text"]) == 100_000_000


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_a_compressed_file_is_read_as_what_it_holds(ending: str, tmp_path: Path) -> None:
    for name, text in (("t.jsonl", '{"text": "a"}\n{"text": 1,}\n'), ("u.csv", "text,label\na,x\n")):
        with pa.output_stream(tmp_path / f"{name}{ending}", compression=COMPRESSED[ending]) as stream:
            stream.write(text.encode())
    assert f"t.jsonl{ending}:2: not JSON" in error(tmp_path / f"t.jsonl{ending}")
    (row,) = open_table(tmp_path / f"u.csv{ending}")
    assert (row.cells, row.place) == ({"text": "a", "label": "x"}, f"{tmp_path}/u.csv{ending}:2")
    assert "cannot unpack" in error(write(tmp_path / f"v.csv{ending}", "text,label\n"))


def test_a_warning_about_a_packed_file_names_the_file_itself(tmp_path: Path) -> None:
    write(tmp_path / "t.csv.gz", gzip.compress('text,label\n"a "b" c","x"\n"caf\xe9","y"\n'.encode("cp1252")))
    with pytest.warns(UserWarning, match=r"t\.csv\.gz") as caught:
        table = open_table(tmp_path / "t.csv.gz")
    texts = [str(one.message) for one in caught] + list(table.notes)
    assert len(texts) == 3
    assert all(text.startswith(f"{tmp_path}/t.csv.gz") for text in texts)


# Encodings


@pytest.mark.parametrize(
    ("content", "hints", "text", "warned"),
    [
        ("größer".encode("cp1252"), SNIFF, "größer", "cp1252"),
        ("жук".encode("cp1251"), Hints(encoding="cp1251"), "жук", None),
        *((word.encode(), Hints(encoding="cp1250"), word, "UTF-8") for word in ("größer", "źle", "£5", "naïve — café")),
        *(("größer 語".encode(), Hints(encoding=name), "größer 語", name) for name in ("cp932", "utf-16", "utf-16-le")),
        *(("größer".encode(name), Hints(encoding=name), "größer", None) for name in ("cp1250", "cp1252")),
        ("語".encode("cp932"), Hints(encoding="cp932"), "語", None),
        (b"ascii", Hints(encoding="cp1250"), "ascii", None),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_utf8_is_read_as_such_and_other_files_by_the_hint(
    name: str, content: bytes, hints: Hints, text: str, warned: str | None, tmp_path: Path
) -> None:
    before, behind = (
        (b"text,label\n", b",a\nfree,b\n") if name == "t.csv" else (b'{"text": "', b'"}\n{"text": "free"}\n')
    )
    path = write(tmp_path / name, before + content + behind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [row["text"] for row in cells_of(path, hints=hints)] == [text, "free"]
    assert len(caught) == (warned is not None)
    assert all(str(warned) in str(one.message) for one in caught)


def test_what_is_set_wins_and_a_mark_over_it(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "a,b^label\nжук^1\n", "cp1251")
    assert cells_of(path, hints=Hints("^", "cp1251")) == ({"a,b": "жук", "label": "1"},)
    assert cells_of(write(path, "text\njaß\n", "utf-8-sig"), hints=Hints(encoding="cp1252")) == ({"text": "jaß"},)
    assert cells_of(write(path, "text\ngrößer\n", "utf-16-le"), hints=Hints(encoding="utf-16")) == ({"text": "größer"},)
    assert sniff(write(path, "ascii\n"), Hints(encoding="cp1250")).encoding == "cp1250", "a corrected copy may need it"


@pytest.mark.parametrize(
    ("content", "hints", "message"),
    [
        (b"\xef\xbb\xbftext\nabc\ncaf\xe9\n", SNIFF, "t.csv:3: byte 0xe9 is not UTF-8"),
        ("text\nschön\ngroß\n".encode() + b"caf\xe9\n", SNIFF, "t.csv:4: byte 0xe9 is not UTF-8"),
        (b"text\ncaf\xe9\n\x81\n", SNIFF, "t.csv:3: byte 0x81 is neither UTF-8 nor CP1252"),
        (b"text\n\xe9\n", Hints(encoding="ascii"), "t.csv:2: byte 0xe9 is not ASCII"),
        ("text\n".encode("utf-16") + b"\x00", SNIFF, "t.csv is not UTF-16"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*was read as cp1252")
def test_what_cannot_be_decoded_is_named_with_its_line_and_a_cure_that_every_command_has(
    content: bytes, hints: Hints, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"save .* as UTF-8.*train and audit.*data\.encoding") as caught:
        open_table(write(tmp_path / "t.csv", content), hints=hints)
    assert message in str(caught.value)


# Quotes

LONE = 'she said "no" twice'


@pytest.mark.parametrize("around", ['"', ""])
def test_one_quote_that_is_not_doubled_changes_no_other_row(around: str, tmp_path: Path) -> None:
    """Before, quotes then belonged to all texts: two classes became three."""
    rows = [(f"row {j} of the table", "pos" if j % 2 else "neg") for j in range(200)]
    rows[70] = (LONE, "pos")
    lines = [f"{around}text{around},{around}label{around}", *(f'"{a}",{around}{b}{around}' for a, b in rows)]
    with pytest.warns(UserWarning, match=r"t\.csv:72: a quote inside a field"):
        assert tuples(write(tmp_path / "t.csv", "\n".join(lines))) == rows


def test_a_quote_that_may_end_its_field_is_an_error_with_its_line(tmp_path: Path) -> None:
    lines = ["text,label", '"a, b","x"', '"he said "no", twice","y"', *(f'"row {j}","x"' for j in range(9))]
    with pytest.warns(UserWarning, match=r"t\.csv:3"):
        assert "t.csv:3" in error(write(tmp_path / "t.csv", "\n".join(lines)))
    lines[2] = '"a "b","x"'
    with pytest.warns(UserWarning, match=r"t\.csv:3"):
        assert tuples(write(tmp_path / "t.csv", "\n".join(lines)))[1] == ('a "b', "x")


@pytest.mark.parametrize("escapes_itself", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_quotes_behind_backslashes_are_read_as_they_were(escapes_itself: bool, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    words = ["plain", '"no"', '5"', "it's", "a, b", "end\\n" if escapes_itself else r"C:\new", ""]
    rows = [(" ".join(rng.choices(words, k=rng.choice([1, 2, 30]))) or "x", rng.choice("ab")) for _ in range(60)]
    rows[:2] = [(LONE, "a"), ("two\nlines" if escapes_itself else r"C:\new day", "b")]
    path = tmp_path / "t.csv"
    if escapes_itself:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, doublequote=False, escapechar="\\", quoting=rng.choice([0, 1]))
            writer.writerows([("text", "label"), *rows])
    else:
        write(path, "\n".join(["text,label", *('"{}",{}'.format(a.replace('"', '\\"'), b) for a, b in rows)]))
    assert tuples(path) == rows


TABLE_KINDS = [("t.csv", ","), ("t.tsv", "\t")]
SPEECH = ['"All of it."' if j == 5 else f'"Well" said {j}, he' if j % 3 else f"plain {j}" for j in range(60)]


def test_a_file_of_speech_in_quotes_stays_literal(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "".join(f"{text}\tx\n" for text in ("text", *SPEECH)))
    assert [text for text, _ in tuples(path)] == SPEECH


@pytest.mark.parametrize(("name", "separator"), TABLE_KINDS)
def test_a_quote_that_may_have_joined_rows_is_named(name: str, separator: str, tmp_path: Path) -> None:
    rows = [["text", "label"], ['"a', "x"], ['b"', "y"], ["c", "x"]]
    path = write(tmp_path / name, "".join(f"{separator.join(row)}\n" for row in rows))
    message = f"{name}:2: a quote joins 2 lines that could each be a row; set data.quoting"
    if separator == "\t":
        assert message in error(path)
    else:
        with pytest.warns(UserWarning, match=message):
            assert len(open_table(path)) == 2
    assert len(open_table(path, hints=Hints(quoting="quoted"))) == 2
    assert [text for text, _ in tuples(path, hints=Hints(quoting="literal"))] == ['"a', 'b"', "c"]


def test_a_file_that_is_both_is_asked_for(tmp_path: Path) -> None:
    lines = ["text,label", *(f'"row {j}",x' if j % 4 == 0 else f"row {j},x" for j in range(40)), '"a" b,x']
    with pytest.raises(DataError, match=r"t\.csv:42: .*data\.quoting"):
        open_table(write(tmp_path / "t.csv", "\n".join(lines)))
    assert len(open_table(tmp_path / "t.csv", hints=Hints(quoting="literal"))) == 41


# What cannot be read


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", "", "t.jsonl has no rows"),
        ("t.csv", "text,label\n", "t.csv has no rows"),
        ("t.jsonl", '{"a": 1}\n{"a": 1,}', "t.jsonl:2: "),
        ("t.jsonl", '{"a": 1}\n\n[1]', "t.jsonl:3: a list"),
        ("t.jsonl", '"a"', "t.jsonl:1: a str"),
        ("t.jsonl", '{"n": ' + "[" * 100_000 + "}", "t.jsonl:1: "),
        ("t.jsonl", '{"a": ' + "1" * 5000 + "}", "t.jsonl:1: "),
        ("t.jsonl", '{"text": "a", "text": "b"}', "t.jsonl:1: "),
        ("t.jsonl", '{"text": "\0"}', "t.jsonl:1: "),
        ("t.json", '[{"a": 1},\n{"a"}]', "t.json:2: "),
        ("t.json", '[{"a": 1},\n2]', "t.json:2: a int"),
        ("t.json", '[{"text": {"x": 1, "x": 2}}]', "'x' twice"),
        ("t.csv", "text,label\na,0\nb\n", "t.csv:3: 1 fields"),
        ("t.csv", 'text,label\n"a\nb",0\nc,d,1\n', "t.csv:4: 3 fields"),
        ("t.csv", 'text,label\na,0\n"b,1\nc\n', "t.csv:3: broken record"),
        ("t.tsv", 'text\tlabel\n"a" b\t0\nc\td\t1\n', "t.tsv:2: broken record"),
        ("t.tsv", 'text\tto\tlabel\n"a\tb"\tx\nc\td\tx\n', "t.tsv:2: a quote hides a separator; set data.quoting"),
        ("t.csv", "\ntext,label,text\na,0,b\n", "t.csv:2: two columns are named 'text'"),
        ("t.csv", "text,label,,\na,0,,\nb,1,x,\n", "t.csv:3: a value in one of 2 columns without a name"),
        ("t.txt", "a", ", ".join(SUFFIXES)),
        ("t.parquet", "PAR1", "t.parquet cannot be read as Parquet"),
        ("t.ods", "PK", "save it as .xlsx, or as CSV UTF-8"),
        ("t.xlsx", "PK", "not a zip file"),
        ("t.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "compressed"),
    ],
)
def test_errors_name_file_and_line(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    result = error(write(tmp_path / name, text))
    assert message in result
    assert name in result


def test_an_archive_is_named_whatever_it_is_called(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("b.csv", "text\na\n")
    assert "compressed" in error(tmp_path / "a.csv")


def test_a_blank_line_in_a_table_of_one_column_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"t\.csv:4: .*blank"):
        assert tuples(write(tmp_path / "t.csv", "text\na\n\n\nb\n\nc\n")) == [("a",), ("b",), ("c",)]


def test_a_mistyped_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "tickets.csv", "text\na\n")
    assert f"mean '{tmp_path}/tickets.csv'" in error(tmp_path / "ticket.csv")


# Parquet


def test_a_directory_name_adds_no_column_to_parquet_and_columns_are_not_doubled(tmp_path: Path) -> None:
    (tmp_path / "label=1").mkdir()
    assert cells_of(write_as(tmp_path / "label=1" / "t.parquet", [{"text": "a"}])) == ({"text": "a"},)
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "t.parquet")
    assert "t.parquet: two columns are named 'text'" in error(tmp_path / "t.parquet")


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
    assert "cannot be read as Parquet" in error(write(tmp_path / "a.parquet", content.replace(b"naive", b"na\xffve")))


@pytest.mark.parametrize(
    "metadata", ["{", "[]", '{"info": 1}', '{"info": {"features": {"label": 3, "tags": [], "k": null}}}', "[" * 9999]
)
def test_parquet_with_other_metadata_is_read_all_the_same(metadata: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "t.parquet")
    assert cells_of(tmp_path / "t.parquet") == ({"text": "a", "label": 0},)
