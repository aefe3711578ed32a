"""What a source holds is seen before any heavy import, whatever its form: every reader, packed, in parts, saved."""

import gzip
import json
from pathlib import Path

import datasets
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsqlora.errors import DataError
from tsqlora.rows.chat import are_answers, find_format
from tsqlora.rows.rows import names_of
from tsqlora.rows.sources import first_rows, open_table, require_source

ROWS = [{"system_prompt": "Be kind.", "question": f"Why {j}?", "response": f"Because of {j}."} for j in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def made(kind: str, folder: Path) -> str:
    """The rows as a file or folder of this kind, and its name."""
    folder.mkdir()
    match kind:
        case "jsonl.gz":
            (folder / "t.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
            return str(folder / "t.jsonl.gz")
        case "wrapped":
            (folder / "t.json").write_text(json.dumps({"version": "1.1", "data": ROWS}, indent=1))
            return str(folder / "t.json")
        case "xlsx":
            book = openpyxl.Workbook()
            for row in ([*ROWS[0]], *([*row.values()] for row in ROWS)):
                book.worksheets[0].append(row)
            book.save(folder / "t.xlsx")
            return str(folder / "t.xlsx")
        case "folder":
            (folder / "train.jsonl").write_text(LINES)
            (folder / "test.jsonl").write_text('{"other": 1}\n')
        case "shards" | "hub":
            inner = folder if kind == "shards" else folder / "data"
            inner.mkdir(exist_ok=True)
            (folder / "README.md").write_text("# Rows")
            for k in range(3):
                rows = pa.Table.from_pylist(ROWS[10 * k : 10 * k + 10])
                pq.write_table(rows, inner / f"train-{k:05}-of-00003.parquet")
        case "saved":
            datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        case "saved splits":
            train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_dict({"other": [1]})
            datasets.DatasetDict({"test": test, "train": train}).save_to_disk(folder)
        case "pattern":
            for k in range(3):
                (folder / f"part-{k}.jsonl").write_text(LINES[: len(LINES) // 3 + k])
                (folder / f"part-{k}.jsonl").write_text(LINES)
            return str(folder / "part-*.jsonl")
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["jsonl.gz", "wrapped", "xlsx", "folder", "shards", "hub", "saved", "saved splits", "pattern"]
)
def test_the_columns_of_every_source_are_seen_as_its_rows_are_read(kind: str, tmp_path: Path) -> None:
    source = made(kind, tmp_path / "rows")
    require_source(source)
    names = names_of(first_rows(source))
    assert names == [*ROWS[0]]
    assert are_answers(names)
    assert [row.cells for row in open_table(source, split="train")][:30] == ROWS


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ("id system_prompt question response", {}),
        ("system user assistant", {}),
        ("type query original_question response", {}),
        ("system_prompt frage antwort", {"prompt": "frage", "target": "antwort"}),
    ],
)
def test_columns_of_usual_data_sets_are_read_with_their_system_prompt(names: str, named: dict[str, str]) -> None:
    columns = find_format(names.split(), source="t.jsonl", **named).columns
    system = next((name for name in names.split() if name.startswith("system")), None)
    assert (columns.system, columns.label) == (system, names.split()[-1])


def test_unknown_columns_are_asked_for_with_the_complete_command() -> None:
    with pytest.raises(DataError, match=r"add --set 'data.prompt=Die Frage' --set data.target=Antwort, or set"):
        find_format(["id", "Die Frage", "Antwort"], source="t.jsonl")
    with pytest.raises(DataError, match=r"add --set data.prompt=a --set data.target=Antwort"):
        find_format(["Antwort", "a"], source="t.jsonl", prompt="a")
