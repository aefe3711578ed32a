"""A copy has the source's rows byte for byte, in Parquet value for value; a corrected one differs in its new labels."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tables import cells_of
from tsqlora.data.readers import PLAIN, SNIFF, Hints, sniff
from tsqlora.data.sources import open_table
from tsqlora.data.write import COPIED, WRITERS, can_copy, copy_rows, corrected_name, write_corrected

BOM = b"\xef\xbb\xbf"
CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ['a "b", c', "x\r\ny", "ünï\n文"]
)
ON_FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def copied(path: Path, data: bytes, *places: int) -> bytes:
    path.write_bytes(data)
    copy_rows(path, path.with_name("out"), np.array(places), sniff(path, SNIFF))
    return path.with_name("out").read_bytes()


def test_every_format_that_is_written_can_be_copied() -> None:
    assert {*COPIED} == {*WRITERS}
    assert can_copy(Path("a.CSV"), Path("b.csv"))
    assert not can_copy(Path("a.csv"), Path("b.tsv"))
    assert not can_copy(Path("a.json"), Path("b.json"))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", BOM])
def test_json_lines_keep_key_order_spaces_and_numbers(start: bytes, end: bytes, tmp_path: Path) -> None:
    lines = ['{"b": 1.50,  "a":"é"}', '{"a": "\\u00e9", "b": 1e2}', "", '{"a":"文\u2028"}']
    raw = [line.encode() + end for line in lines]
    assert copied(tmp_path / "t.jsonl", start + b"".join(raw), 0, 2) == start + raw[0] + raw[3]
    assert copied(tmp_path / "t.jsonl", start + b"".join(raw), 1) == start + raw[1]


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", b","), (".tsv", b"\t")])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("start", [b"", BOM, BOM + b"\n"])
def test_records_keep_quotes_header_and_line_ends(
    start: bytes, end: bytes, suffix: str, mark: bytes, tmp_path: Path
) -> None:
    header, first, second, third = (
        mark.join(cells) + end
        for cells in (
            [b'"text"', b"n"],
            ['"a ""quoted"" line\r\nünd\nmore"'.encode(), b"01"],
            [b"plain", b'"1"'],
            ["文字 🙂".encode(), b""],
        )
    )
    data = start + header + first + end + second + third
    assert copied(tmp_path / f"t{suffix}", data, 0, 2) == start + header + first + third
    assert copied(tmp_path / f"t{suffix}", data, 1) == start + header + second


def test_a_file_that_ends_without_a_line_end_still_does(tmp_path: Path) -> None:
    assert copied(tmp_path / "t.jsonl", b'{"a": 1}\n{"a": 2}', 1) == b'{"a": 2}'
    assert copied(tmp_path / "t.csv", b"a\n1\n2", 0, 1) == b"a\n1\n2"


@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    data=st.data(),
)
@ON_FILES
def test_any_rows_read_back_as_those_rows(
    rows: list[tuple[str, str]], suffix: str, end: str, bom: bool, data: st.DataObject, tmp_path: Path
) -> None:
    text = io.StringIO(newline="")
    if suffix == ".jsonl":
        text.writelines(json.dumps({"a": a, "b": b}, ensure_ascii=False) + end for a, b in rows)
    else:
        # With "\n" between lines Python 3.11 writes a lone "\r" unquoted, which ends a line when it is read.
        quoting = csv.QUOTE_ALL if "\r" in "".join(map("".join, rows)) else csv.QUOTE_MINIMAL
        writer = csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator=end, quoting=quoting)
        writer.writerows([("a", "b"), *rows])
    places = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    whole = (BOM if bom else b"") + text.getvalue().encode()
    out = copied(tmp_path / f"t{suffix}", whole, *places)
    (tmp_path / f"u{suffix}").write_bytes(out)
    assert [(row["a"], row["b"]) for row in cells_of(tmp_path / f"u{suffix}")] == [rows[j] for j in places]
    assert copied(tmp_path / f"t{suffix}", whole, *range(len(rows))) == whole


def parquet(path: Path) -> pa.Table:
    columns: dict[str, Any] = {
        "text": pa.array(["é", None, "c", "d", "e"], pa.large_string()),
        "n": pa.array([1, 2, 3, 4, None], pa.int8()),
        "when": pa.array([0, 1, 2, 3, 4], pa.timestamp("us", "UTC")),
        "kind": pa.array(["x", "y", "x", "z", "y"]).dictionary_encode(),
        "list": pa.array([[1], [], None, [2, 3], [4]], pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({"made by": "hand"}), path, row_group_size=2)
    # As Parquet gives it back: it names a list's element otherwise.
    return pq.ParquetFile(path).read()


@pytest.mark.parametrize("places", [[0], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_parquet_keeps_schema_metadata_and_values(places: list[int], tmp_path: Path) -> None:
    table = parquet(tmp_path / "t.parquet")
    copy_rows(tmp_path / "t.parquet", tmp_path / "out.parquet", np.array(places), PLAIN)
    result = pq.ParquetFile(tmp_path / "out.parquet").read()
    assert result.schema.equals(table.schema, check_metadata=True)
    assert result.to_pylist() == table.take(places).to_pylist()


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'a\n1\n"2\n')
    with pytest.raises(Exception, match="broken record"):
        copy_rows(tmp_path / "t.csv", tmp_path / "out.csv", np.array([0, 1]), PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


# Corrected labels

FILES = [
    ("a.csv", '\ufefftext;label\r\n"a; ""b""";no\r\n\r\n\'c\';"yes"\r\n', {1: "no"}, ("'c';\"yes\"", "'c';no")),
    ("a.csv", 'text,label\n"two\nlines","0"\nb,1', {0: 1}, ('lines","0"', 'lines",1')),
    ("a.csv", 'text,label\n"two\nlines",0\nb,1', {1: 0}, ("b,1", "b,0")),
    ("a.csv", 'text,label\nok,0\n"two\nlines",1', {1: 0}, ('lines",1', 'lines",0')),
    ("a.csv", 'text,label\r"two\nlines",1\rok,0\r', {0: 0}, ('lines",1', 'lines",0')),
    ("a.csv", 'text,label\nok,0\n"two\rlines",1', {1: 0}, ('lines",1', 'lines","0"')),
    ("a.tsv", "label\ttext\nno\tä\nyes\tb\n", {0: "yes"}, ("no\tä", "yes\tä")),
    ("a.jsonl", '{"text":"a","label":0}\n\n{"text": "ä", "label": 1}\r\n', {1: 0}, ('"label": 1', '"label": 0')),
    ("a.json", '{"text":"a","label":"no"}\n{"text": "b", "label": "ä"}', {1: "no"}, ('"label": "ä"', '"label": "no"')),
]


@pytest.mark.parametrize(("name", "text", "labels", "change"), FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_what_is_no_changed_label_stays_byte_by_byte(
    name: str, text: str, labels: dict[int, str | int], change: tuple[str, str], encoding: str, tmp_path: Path
) -> None:
    text = text if encoding == "utf-8" else text.removeprefix("\ufeff")
    (tmp_path / name).write_bytes(text.encode(encoding))
    source = open_table(tmp_path / name, hints=Hints(encoding=encoding))
    out = tmp_path / corrected_name(source)
    write_corrected(source, out, {row: {"label": label} for row, label in labels.items()})
    assert out.read_bytes() == text.replace(*change).encode(encoding)


@pytest.mark.parametrize(
    ("encoding", "mark", "plain"),
    [("utf-8-sig", BOM, "utf-8"), ("UTF_8_SIG", BOM, "utf-8"), ("utf-16", b"\xff\xfe", "utf-16-le")],
)
@pytest.mark.parametrize("marked", [False, True])
def test_an_encoding_with_a_mark_copies_files_with_and_without_one(
    marked: bool, encoding: str, mark: bytes, plain: str, tmp_path: Path
) -> None:
    def data(text: str) -> bytes:
        return mark * marked + text.encode(plain)

    (tmp_path / "a.csv").write_bytes(data("text,label\nä,0\nb,1\n"))
    source = open_table(tmp_path / "a.csv", hints=Hints(encoding=encoding))
    assert tuple(row.cells for row in source) == ({"text": "ä", "label": "0"}, {"text": "b", "label": "1"})
    write_corrected(source, tmp_path / "b.csv", {0: {"label": 1}})
    assert (tmp_path / "b.csv").read_bytes() == data("text,label\nä,1\nb,1\n")
    copy_rows(tmp_path / "a.csv", tmp_path / "c.csv", np.array([1]), source.dialect)
    assert (tmp_path / "c.csv").read_bytes() == data("text,label\nb,1\n")


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8-sig", BOM), ("utf-16", b"\xff\xfe")])
def test_a_corrected_array_keeps_its_byte_order_mark(encoding: str, mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('[{"text": "ä", "label": "no"}]'.encode(encoding))
    write_corrected(open_table(tmp_path / "a.json"), tmp_path / "b.json", {0: {"label": "yes"}})
    assert (tmp_path / "b.json").read_bytes().startswith(mark)
    assert cells_of(tmp_path / "b.json") == ({"text": "ä", "label": "yes"},)


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    schema = pa.schema(
        [("text", pa.large_string()), ("label", pa.dictionary(pa.int8(), pa.string())), ("n", pa.int16())]
    )
    table = pa.table({"text": ["a", "b"], "label": ["no", "yes"], "n": [1, None]}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    write_corrected(open_table(tmp_path / "a.parquet"), tmp_path / "b.parquet", {1: {"label": "no"}})
    result = pq.read_table(tmp_path / "b.parquet")
    assert result.schema == schema
    assert result.to_pylist() == [{"text": "a", "label": "no", "n": 1}, {"text": "b", "label": "no", "n": None}]
