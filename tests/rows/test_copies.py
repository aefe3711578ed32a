"""A copy has the source's cells, in its dialect or schema; a corrected one differs in its new labels alone."""

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
from tsqlora.rows.readers import Hints
from tsqlora.rows.sources import open_table
from tsqlora.rows.write import copy_rows

CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ['a "b", c', "x\r\ny", "ünï\n文"]
)
ON_FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    data=st.data(),
)
@ON_FILES
def test_any_rows_read_back_as_those_rows_with_their_new_cells(
    rows: list[tuple[str, str]], suffix: str, end: str, encoding: str, data: st.DataObject, tmp_path: Path
) -> None:
    text = io.StringIO(newline="")
    if suffix == ".jsonl":
        text.writelines(json.dumps({"a": a, "b": b}, ensure_ascii=False) + end for a, b in rows)
    elif suffix == ".json":
        json.dump([{"a": a, "b": b} for a, b in rows], text)
    else:
        # With "\n" between lines Python 3.11 writes a lone "\r" unquoted, which ends a line when it is read.
        quoting = csv.QUOTE_ALL if "\r" in "".join(map("".join, rows)) else csv.QUOTE_MINIMAL
        writer = csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator=end, quoting=quoting)
        writer.writerows([("a", "b"), *rows])
    source = tmp_path / f"t{suffix}"
    source.write_bytes(text.getvalue().encode(encoding))
    hints = Hints(quoting="quoted") if suffix in (".csv", ".tsv") else Hints()
    places = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    new = data.draw(st.dictionaries(st.sampled_from(places), CELL))
    table = open_table(source, hints=hints)
    copy_rows(table, tmp_path / f"u{suffix}", np.array(places), {place: {"b": b} for place, b in new.items()})
    again = [(row["a"], row["b"]) for row in cells_of(tmp_path / f"u{suffix}", hints=hints)]
    assert again == [(rows[j][0], new.get(j, rows[j][1])) for j in places]


FILES = [
    ("a.csv", 'text;label\r\n"a; ""b""";no\r\n\r\n\'c\';"yes"\r\n'),
    ("a.csv", "sep=;\r\ntext;label\r\na, b;x\r\nc;y\r\n"),
    ("a.csv", 'text,label\n"two\nlines","0"\nb,01'),
    ("a.csv", 'text,label\r"two\nlines",1\rok,0\r'),
    ("a.csv", 'text,label,,\nhe said "no,0,,\nb,1,,\n'),
    ("a.tsv", 'label\ttext\nno\t"so" they\nyes\tb\n'),
    ("a.jsonl", '{"text":"a","label":0, "n": 1.50}\n\n{"label": 1, "text": "\\u00e4\u2028", "n": null}\r\n'),
    ("a.json", '{"text":"a","label":"no"}\n{"text": "b", "label": "ä"}'),
    ("a.json", '{"version": 2, "data": [{"text": "ä", "label": "no"}, {"text": "b", "label": "ä"}]}'),
]


@pytest.mark.parametrize(("name", "text"), FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_a_correction_changes_one_cell_in_any_dialect(name: str, text: str, encoding: str, tmp_path: Path) -> None:
    text = text.replace("\u2028", "") if encoding == "cp1252" else text
    (tmp_path / name).write_bytes(text.encode(encoding))
    hints = Hints(encoding=encoding)
    source = open_table(tmp_path / name, hints=hints)
    out, rows = tmp_path / f"copy{Path(name).suffix}", [row.cells for row in source]
    copy_rows(source, out, cells={1: {"label": "x"}})
    copied = open_table(out, hints=hints)
    assert [row.cells for row in copied] == [rows[0], {**rows[1], "label": "x"}]
    assert (copied.dialect.delimiter, copied.dialect.encoding) == (source.dialect.delimiter, source.dialect.encoding)


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
    new = {4: {"kind": "x", "n": 7}}
    copy_rows(open_table(tmp_path / "t.parquet"), tmp_path / "out.parquet", np.array(places), new)
    result = pq.ParquetFile(tmp_path / "out.parquet").read()
    assert result.schema.equals(table.schema, check_metadata=True)
    assert result.to_pylist() == [row | new.get(j, {}) for j, row in enumerate(table.to_pylist()) if j in places]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a\n1\n2\n", encoding="ascii")
    table = open_table(tmp_path / "t.csv", hints=Hints(encoding="ascii"))
    with pytest.raises(Exception, match="write"):
        copy_rows(table, tmp_path / "out.csv", cells={0: {"a": "\ud800"}})
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
