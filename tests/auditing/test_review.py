"""Every type of label in every file: a review is applied, and the rows without a new label stay as they are."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runs import make_rows, save_checkpoint
from tables import cells_of
from tsqlora.auditing.command import run_audit
from tsqlora.auditing.review import apply_review
from tsqlora.rows.write import write_rows

ROWS = 48
REVIEWED = (5, 17, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("review")))


def texts() -> list[str]:
    return [f'{row["text"]}, "so" {"ä" * (j % 3)}' for j, row in enumerate(make_rows(ROWS))]


def review(source: Path | str, model: str, to: Callable[[dict[str, str]], str], **options: Any) -> dict[str, Any]:
    """Audit a file, and apply a review that gives some rows the label that `to` chooses by their line of the table."""
    folder = Path(source).parent / "audit"
    run_audit(str(source), model=model, out=folder, **options)
    with open(folder / "suspects.csv", encoding="utf-8", newline="") as file:
        lines = {int(line["row"]): line for line in csv.DictReader(file)}
    chosen = [{**lines[row], "reviewed_label": to(lines[row])} for row in REVIEWED]
    write_rows(folder / "reviewed.csv", chosen)
    return apply_review(folder / "reviewed.csv")


TYPES: dict[str, tuple[pa.DataType, tuple[Any, Any]]] = {
    "bool": (pa.bool_(), (False, True)),
    **{f"int{n}": (getattr(pa, f"int{n}")(), (0, 1)) for n in (8, 16, 32, 64)},
    "uint8": (pa.uint8(), (3, 7)),
    "float32": (pa.float32(), (0.0, 1.0)),
    "float64": (pa.float64(), (0.0, 1.0)),
    "string": (pa.string(), ("no", "yes")),
    "large_string": (pa.large_string(), ("no", "yes")),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ("no", "yes")),
}


@pytest.mark.parametrize("name", TYPES)
def test_parquet_keeps_the_type_of_its_labels_and_every_other_row(name: str, model: str, tmp_path: Path) -> None:
    kind, values = TYPES[name]
    labels = [values[j // 2 % 2] for j in range(ROWS)]
    table = pa.table({"text": texts(), "label": pa.array(labels, type=pa.string()).cast(kind) if "dict" in name else
                      pa.array(labels, type=kind), "n": np.arange(ROWS) / 3})  # fmt: skip
    pq.write_table(table, tmp_path / "rows.parquet")
    result = review(tmp_path / "rows.parquet", model, lambda line: line["suggested_label"])
    corrected = pq.read_table(result["corrected"])
    assert corrected.schema == table.schema
    other = dict(zip(values, reversed(values), strict=True))
    expected = [other[label] if j in REVIEWED else label for j, label in enumerate(labels)]
    assert corrected.to_pydict() == table.to_pydict() | {"label": expected}
    assert [row["label"] for row in cells_of(result["trusted"])] == [expected[j] for j in REVIEWED]


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((False, True), ".jsonl"),
        ((0, 1), ".json"),
        ((0.0, 1.0), ".jsonl.gz"),
        (("no", "yes"), ".json"),
        (("1", "2"), ".jsonl.gz"),
        (("1.0", "2.0"), ".jsonl"),
    ],
)
def test_json_keeps_the_type_of_its_labels(values: tuple[Any, Any], suffix: str, model: str, tmp_path: Path) -> None:
    rows = [{"text": text, "label": values[j // 2 % 2], "n": None} for j, text in enumerate(texts())]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl.gz":
        data.write_bytes(gzip.compress(lines.encode()))
    else:
        data.write_text(json.dumps(rows) if suffix == ".json" else lines)
    result = review(data, model, lambda line: line["suggested_label"])
    other = dict(zip(values, reversed(values), strict=True))
    expected = [row | {"label": other[row["label"]]} if j in REVIEWED else row for j, row in enumerate(rows)]
    assert repr(cells_of(result["corrected"])) == repr(tuple(expected))


def test_names_of_class_numbers_are_written_as_numbers(model: str, tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    labels = [j // 2 % 2 for j in range(ROWS)]
    datasets.Dataset.from_dict({"text": texts(), "label": labels}, features=features).to_parquet(tmp_path / "r.parquet")
    result = review(tmp_path / "r.parquet", model, lambda line: line["suggested_label"])
    expected = [1 - label if j in REVIEWED else label for j, label in enumerate(labels)]
    assert pq.read_table(result["corrected"])["label"].to_pylist() == expected


SETS = {
    "lists": (lambda names: names, ".jsonl"),
    "lists of numbers": (lambda names: [len(name) for name in names], ".jsonl"),
    "lists in Parquet": (lambda names: names, ".parquet"),
    "lists as pandas writes them": (str, ".csv"),
    "numbers as pandas writes them": (lambda names: str([len(name) for name in names]), ".csv"),
    "lists as JSON": (json.dumps, ".csv"),
    "bars": ("|".join, ".csv"),
}


@pytest.mark.parametrize("form", SETS)
def test_sets_of_labels_are_found_and_keep_their_form(form: str, model: str, tmp_path: Path) -> None:
    write, suffix = SETS[form]
    names = [[["joy"], ["joy", "anger"], ["love"], ["love", "joy"]][j % 4] for j in range(ROWS)]
    rows = [
        {"text": text, "labels": write(own), "n": str(j)}
        for j, (text, own) in enumerate(zip(texts(), names, strict=True))
    ]
    write_rows(tmp_path / f"rows{suffix}", rows)
    numbers = "numbers" in form
    result = review(tmp_path / f"rows{suffix}", model, lambda _: "3|5" if numbers else "joy|anger")
    about = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert about["classes"] == ([3, 4, 5] if numbers else ["anger", "joy", "love"])
    expected = [row | {"labels": write(["joy", "anger"])} if j in REVIEWED else row for j, row in enumerate(rows)]
    assert repr(cells_of(result["corrected"])) == repr(tuple(expected))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("several", [False, True])
def test_columns_of_zeros_and_ones_are_labels(several: bool, suffix: str, model: str, tmp_path: Path) -> None:
    names = ["joy", "love", "anger"]
    sets = [{names[j % 3], *(names[:2] if several and j % 4 == 0 else ())} for j in range(ROWS)]
    rows = [
        {"text": text, **{name: int(name in own) for name in names}} for text, own in zip(texts(), sets, strict=True)
    ]
    write_rows(tmp_path / f"rows{suffix}", rows)
    source = cells_of(tmp_path / f"rows{suffix}")
    result = review(tmp_path / f"rows{suffix}", model, lambda _: "joy|love" if several else "love")
    about = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert (about["classes"], about["answer"]) == (sorted(names), "labels" if several else "class")
    assert any("'joy', 'love', 'anger'" in note for note in about["notes"])
    new = {name: type(source[0]["joy"])(int(name == "love" or (several and name == "joy"))) for name in names}
    expected = [row | new if j in REVIEWED else row for j, row in enumerate(source)]
    assert repr(cells_of(result["corrected"])) == repr(tuple(expected))
    assert cells_of(result["trusted"]) == tuple(expected[j] | {"reviewed_as": "suspect"} for j in REVIEWED)
    assert "data.label" not in result["next"]


def test_a_spelling_is_listed_with_the_common_one_and_applied(model: str, tmp_path: Path) -> None:
    labels = [("pos", "neg")[j // 2 % 2] for j in range(ROWS)]
    spelled = dict.fromkeys(REVIEWED, " Pos")
    rows = [{"text": text, "label": spelled.get(j, labels[j])} for j, text in enumerate(texts())]
    write_rows(tmp_path / "rows.csv", rows)
    with pytest.warns(UserWarning, match="other spellings"):
        result = review(tmp_path / "rows.csv", model, lambda line: labels[int(line["row"])])
    about = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert about["classes"] == ["neg", "pos"]
    assert {(one["written"], one["label"]) for one in about["spellings"]} == {(" Pos", "pos")}
    assert sum(one["rows"] for one in about["spellings"]) == len(REVIEWED)
    assert [row["label"] for row in cells_of(result["corrected"])] == labels
    assert result["changed"] == len(REVIEWED)
