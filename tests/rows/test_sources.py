import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tables import cells_of
from tsqlora.errors import DataError
from tsqlora.rows.sources import open_table, open_tables
from tsqlora.rows.table import Table
from tsqlora.rows.write import copy_rows


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def error(source: str | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_table(source, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t")])
def test_quotes_that_enclose_nothing_belong_to_the_text(name: str, separator: str, tmp_path: Path) -> None:
    """As in GLUE's own files."""
    texts = ['he said "no', '"so" they said', 'five" wide', "plain"]
    path = write(
        tmp_path / name,
        "".join(f"{a}{separator}{b}\n" for a, b in [("text", "label"), *zip(texts, "abab", strict=True)]),
    )
    table = open_table(path)
    assert [row.cells["text"] for row in table] == texts
    copy_rows(table, tmp_path / f"copy{path.suffix}", np.array([1, 3]))
    copy_rows(table, tmp_path / f"corrected{path.suffix}", cells={1: {"label": "z"}})
    assert (tmp_path / f"copy{path.suffix}").read_text().splitlines()[1:] == [
        f'"so" they said{separator}b',
        f"plain{separator}b",
    ]
    assert (tmp_path / f"corrected{path.suffix}").read_text().splitlines()[2] == f'"so" they said{separator}z'


def test_excel_may_name_the_separator_in_the_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "sep=;\r\ntext;label\r\na, b;x\r\nc;d;y\r\n")
    assert "t.csv:4: 3 fields" in error(path)
    path = write(tmp_path / "t.csv", "sep=;\r\ntext;label\r\na, b;x\r\nc;y\r\n")
    table = open_table(path)
    assert [row.cells for row in table] == [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]
    copy_rows(table, tmp_path / "copy.csv", np.array([1]))
    assert [row.cells for row in open_table(tmp_path / "copy.csv")] == [{"text": "c", "label": "y"}]


@pytest.mark.parametrize("inner", ["", "data"])
def test_shards_as_the_hub_has_them_are_one_split(inner: str, tmp_path: Path) -> None:
    (tmp_path / inner).mkdir(exist_ok=True)
    for name in ("README.md", ".gitattributes", "dataset_infos.json"):
        write(tmp_path / name, "{}")
    for k in range(2):
        rows = pa.Table.from_pylist([{"text": f"{k}{j}", "label": j} for j in range(3)])
        pq.write_table(rows, tmp_path / inner / f"train-{k:05}-of-00002.parquet")
        write(tmp_path / inner / f"test-{k:05}-of-00002.jsonl", f'{{"text": "test {k}"}}\n')
    tables = open_tables(str(tmp_path), None, None)
    assert [row.cells["text"] for row in tables["train"]] == ["00", "01", "02", "10", "11", "12"]
    assert [row.cells["text"] for row in tables["test"]] == ["test 0", "test 1"]
    assert [row.place.endswith(f"test-0000{k}-of-00002.jsonl:1") for k, row in enumerate(tables["test"])] == [True] * 2
    pattern = tmp_path / inner / "train-*.parquet"
    assert len(open_table(str(pattern))) == 6
    assert "several kinds" in error(str(tmp_path / inner / "t*"))


def test_parquet_files_that_name_class_numbers_differently_are_refused(tmp_path: Path) -> None:
    for name, classes in (("a", ["bad", "good"]), ("b", ["cold", "hot"])):
        features = datasets.Features({"label": datasets.ClassLabel(names=classes)})
        datasets.Dataset.from_dict({"label": [0, 1]}, features=features).to_parquet(tmp_path / f"{name}.parquet")
    message = error(tmp_path / "*.parquet")
    assert all(name in message for name in ("a.parquet", "b.parquet", "'label'"))
    pq.write_table(pa.table({"label": [0, 1]}), tmp_path / "b.parquet")
    assert "b.parquet" in error(tmp_path / "*.parquet"), "its numbers have no names"


def test_parquet_files_whose_types_differ_a_little_are_one_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1], "n": [None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"label": [0.0, None], "text": ["b", "c"], "more": ["x", "y"]}), tmp_path / "b.parquet")
    table = open_table(str(tmp_path / "*.parquet"))
    assert table.names == ("text", "label", "n", "more")
    rows = [{name: value for name, value in row.cells.items() if value is not None} for row in table]
    second = [{"text": "b", "label": 0, "more": "x"}, {"text": "c", "more": "y"}]
    assert rows == [{"text": "a", "label": 1}, *second]
    pq.write_table(pa.table({"label": ["no"], "text": ["b"]}), tmp_path / "b.parquet")
    message = error(tmp_path / "*.parquet")
    assert "b.parquet" in message
    assert "label" in message
    pq.write_table(pa.table({"label": [2**60 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"label": [0.5]}), tmp_path / "b.parquet")
    assert "a.parquet" in error(tmp_path / "*.parquet")


def test_a_data_set_that_was_saved_is_read(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name], "label": [1]}) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    tables = open_tables(str(tmp_path / "both"), None, None)
    assert [[row.cells["text"] for row in tables[name]] for name in splits] == [["train"], ["validation"]]
    splits["train"].save_to_disk(tmp_path / "one")
    assert len(open_table(tmp_path / "one", split="train")) == 1
    datasets.Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}).save_to_disk(tmp_path / "prepared")
    assert "tsqlora audit --prepared" in error(tmp_path / "prepared", split="train")


@pytest.mark.parametrize(
    "source",
    [
        *("train.jsonl", "data/train.csv", "./train", "/no/such/train", "~no-such-user/x", "a" * 5000),
        *("a/b/c", "a/../b", "a\0b", "http://x", "a--b", "C:\\data\\train", "../x:a[b]", "\ud800", "/dev/null"),
    ],
)
def test_the_hub_is_not_queried_for_what_cannot_be_an_id(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: pytest.fail(f"asked the hub for {name}"))
    assert error(source).startswith("no file ")


# Splits


def directory(tmp_path: Path, *names: str) -> str:
    for name in names:
        write(tmp_path / name, json.dumps({"text": name}))
    return str(tmp_path)


def first_texts(tables: dict[str, Table]) -> dict[str, str]:
    return {name: next(iter(table)).cells["text"] for name, table in tables.items()}


@pytest.mark.parametrize("validation", ["validation.jsonl", "valid.jsonl", "Dev.jsonl"])
def test_splits_of_a_directory_are_found_by_name(validation: str, tmp_path: Path) -> None:
    folder = directory(tmp_path, "test.jsonl", validation, "train.jsonl", "notes.jsonl", ".train.swp")
    result = open_tables(folder, None, None)
    assert first_texts(result) == {"train": "train.jsonl", "validation": validation, "test": "test.jsonl"}
    assert list(result) == ["train", "validation", "test"]
    assert next(iter(result["train"])).place == f"{tmp_path / 'train.jsonl'}:1"


def test_an_explicit_split_takes_the_place_of_the_directory_s(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = directory(tmp_path / "other", "mine.jsonl")
    folder = directory(tmp_path, "train.jsonl", "dev.jsonl", "valid.jsonl", "test.jsonl")
    result = open_tables(folder, f"{other}/mine.jsonl", None)
    assert first_texts(result) == {"train": "train.jsonl", "validation": "mine.jsonl", "test": "test.jsonl"}


def test_trusted_rows_are_those_that_are_named_alone(tmp_path: Path) -> None:
    names = ("train", "trusted", "test")
    folder = directory(tmp_path, *(f"{name}.jsonl" for name in names))
    assert list(open_tables(folder, None, None)) == ["train", "test"]
    for trusted in (folder, f"{folder}/trusted.jsonl"):
        assert first_texts(open_tables(folder, None, None, trusted)) == {name: f"{name}.jsonl" for name in names}
    (tmp_path / "one").mkdir()
    one = directory(tmp_path / "one", "train.jsonl")
    assert open_tables(folder, None, None, one)["trusted"].name == f"{one}/train.jsonl"
    with pytest.raises(DataError, match="name one file"):
        open_tables(one, None, None, directory(tmp_path / "one", "test.jsonl"))


def test_a_training_file_alone_has_no_other_split(tmp_path: Path) -> None:
    folder = directory(tmp_path, "train.jsonl", "test.jsonl")
    assert first_texts(open_tables(f"{folder}/train.jsonl", None, None)) == {"train": "train.jsonl"}


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    folder = directory(tmp_path, "train.jsonl", "dev.jsonl", "valid.csv")
    with pytest.raises(DataError, match=r"validation: dev.jsonl, valid.csv"):
        open_tables(folder, None, None)


def test_a_file_that_no_reader_reads_is_no_split(tmp_path: Path) -> None:
    folder = directory(tmp_path, "train.jsonl", "train.log", "test.png")
    assert first_texts(open_tables(folder, None, None)) == {"train": "train.jsonl"}
    with pytest.raises(DataError, match=r"validation\.ods is a spreadsheet"):
        open_tables(directory(tmp_path, "validation.ods"), None, None)


def test_a_folder_of_images_may_have_one_that_is_named_like_a_split(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    (tmp_path / "train.png").write_bytes(b"")
    splits = open_tables(str(tmp_path), None, None)
    assert [row.cells["label"] for row in splits["train"]] == ["cat", "dog", None]


def test_a_directory_without_training_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train"):
        open_tables(directory(tmp_path, "test.jsonl"), None, None)


def test_one_split_of_a_directory_can_be_read(tmp_path: Path) -> None:
    folder = directory(tmp_path, "train.jsonl", "test.jsonl")
    assert cells_of(folder, split="test") == ({"text": "test.jsonl"},)
    assert "train, test" in error(folder)
    assert "validation" in error(folder, split="validation")


# The hub


def test_a_hub_data_set_is_read_by_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": name}] * 2) for name in ("train", "dev", "extra")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(parts))
    result = open_tables("owner/name", None, None)
    assert first_texts(result) == {"train": "train", "validation": "dev"}
    assert list(result["validation"])[1].place == "owner/name[dev]:2"
    assert cells_of("name", split="extra")[0] == {"text": "extra"}


def test_one_split_of_a_configuration_is_the_split_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, configuration: str | None, *, split: str | None) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": f"{name} {configuration} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = open_tables("nyu-mll/glue:mrpc[train[:9]]", "glue[validation]", None)
    assert first_texts(result) == {"train": "nyu-mll/glue mrpc train[:9]", "validation": "glue None validation"}
    assert result["train"].name == "nyu-mll/glue:mrpc[train[:9]]"


@pytest.mark.parametrize("kind", [datasets.Sequence, datasets.List, datasets.LargeList])
@pytest.mark.parametrize("stored", ["hub", "parquet", "shards", "saved"])
def test_class_numbers_have_the_names_of_their_data_set(
    kind: Any, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = datasets.ClassLabel(names=["O", "B-person"])
    features = datasets.Features(
        {"ner_tags": kind(names), "label": names, "ids": kind(datasets.Value("int64")), "k": datasets.ClassLabel(2)}
    )
    rows = [{"ner_tags": tags, "label": 1, "ids": [0], "k": 1} for tags in ([1, 0], [], None)]
    data = datasets.Dataset.from_list([*rows, {"label": -1}], features=features)
    source = str(tmp_path)
    if stored == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": data}))
        source = "owner/name"
    elif stored == "saved":
        data.save_to_disk(tmp_path)
    else:
        data.to_parquet(tmp_path / f"train{'-00000-of-00001' if stored == 'shards' else ''}.parquet")
    result = cells_of(source)
    assert [row["ner_tags"] for row in result[:3]] == [["B-person", "O"], [], None]
    assert [(row["label"], row["ids"], row["k"]) for row in result[:3]] == [("B-person", [0], 1)] * 3
    assert result[3]["label"] is None, "-1 means no class"
    assert [row.cells["label"] for row in open_table(source).numbered()] == [1, 1, 1, -1]


def test_a_corrected_label_is_written_as_the_number_of_its_name(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    path = tmp_path / "t.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 0]}, features=features).to_parquet(path)
    copy_rows(open_table(path), tmp_path / "out.parquet", cells={1: {"label": "yes"}})
    assert pq.read_table(tmp_path / "out.parquet")["label"].to_pylist() == [0, 1]
    assert [row["label"] for row in cells_of(tmp_path / "out.parquet")] == ["no", "yes"]


def test_an_empty_hub_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": []})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: empty)
    assert error("owner/name").startswith("owner/name[train] has no rows")


@pytest.mark.parametrize(
    ("reason", "text"),
    [(FileNotFoundError("no such\nand more"), "(no such and more)"), (ConnectionError(), "(ConnectionError)")],
)
def test_every_error_of_the_hub_becomes_one_error(
    reason: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise reason

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = error("owner/name")
    assert "owner/name" in message
    assert text in message


def test_a_folder_without_training_rows_says_what_was_looked_for_and_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"without a file train \(\.jsonl.*set data\.train to a file of rows$"):
        open_tables(str(tmp_path), None, None)
    (tmp_path / "mine.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match=r"such as .*mine\.csv"):
        open_tables(str(tmp_path), None, None)


@pytest.mark.parametrize("source", ["csv", "text", "imagefolder"])
def test_the_name_of_a_kind_of_file_takes_no_files_that_happen_to_lie_here(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private.csv").write_text("text,label\nsecret,1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=source):
        open_table(source)
