"""A corrected copy differs in the labels of the changed rows, and in no other byte."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsqlora.data.correct import corrected_name, write_corrected
from tsqlora.data.dialect import Hints
from tsqlora.data.rows import open_split

FILES = [
    ("a.csv", '\ufefftext;label\r\n"a; ""b""";no\r\n\r\n\'c\';"yes"\r\n', {1: "no"}, ("'c';\"yes\"", "'c';no")),
    ("a.csv", 'text,label\n"two\nlines","0"\nb,1', {0: 1}, ('lines","0"', 'lines",1')),
    ("a.csv", 'text,label\n"two\nlines",0\nb,1', {1: 0}, ("b,1", "b,0")),
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
    source = open_split(tmp_path / name, hints=Hints(encoding=encoding))
    out = tmp_path / corrected_name(source)
    write_corrected(source, out, "label", labels)
    assert out.read_bytes() == text.replace(*change).encode(encoding)


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    schema = pa.schema(
        [("text", pa.large_string()), ("label", pa.dictionary(pa.int8(), pa.string())), ("n", pa.int16())]
    )
    table = pa.table({"text": ["a", "b"], "label": ["no", "yes"], "n": [1, None]}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    write_corrected(open_split(tmp_path / "a.parquet"), tmp_path / "b.parquet", "label", {1: "no"})
    found = pq.read_table(tmp_path / "b.parquet")
    assert found.schema == schema
    assert found.to_pylist() == [{"text": "a", "label": "no", "n": 1}, {"text": "b", "label": "no", "n": None}]
