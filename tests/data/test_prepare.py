"""Files become samples of every split; classes come from the training rows alone."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from runs import make_rows, save_checkpoint, write_jsonl
from tsqlora.data.labels import LabelMap
from tsqlora.data.prepare import Splits, encode, prepare, read_data, resolve_max_length
from tsqlora.errors import DataError, SettingsError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("model")))


def read(train: Path, **options: Any) -> Splits:
    defaults: dict[str, Any] = {
        "validation": None,
        "test": None,
        "text": None,
        "text_pair": None,
        "label": None,
        "classes": True,
        "validation_fraction": 0.25,
        "seed": 0,
    }
    return read_data(str(train), **(defaults | options))


def test_without_validation_a_share_of_the_training_rows_is_taken_class_by_class(tmp_path: Path) -> None:
    rows = make_rows(40)
    splits = read(write_jsonl(tmp_path / "train.jsonl", rows))
    assert {name: len(split) for name, split in splits.rows.items()} == {"train": 30, "validation": 10}
    assert sum(row["label"] for row in splits.rows["validation"].rows) == 5
    assert sorted(splits.rows["train"].numbers + splits.rows["validation"].numbers) == list(range(1, 41))


def test_the_seed_decides_the_validation_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", make_rows(40))
    numbers = [read(path, seed=seed).rows["validation"].numbers for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_named_validation_file_leaves_the_training_rows_whole(tmp_path: Path) -> None:
    train, held_out = (write_jsonl(tmp_path / f"{n}.jsonl", make_rows(n)) for n in (40, 6))
    splits = read(train, validation=str(held_out), test=str(held_out))
    assert {name: len(split) for name, split in splits.rows.items()} == {"train": 40, "validation": 6, "test": 6}


def test_classes_that_differ_in_case_or_spaces_alone_are_told(tmp_path: Path) -> None:
    texts = ("Sport", "sport ", "news", "sport")
    rows = [{"text": "good", "label": label} for label in texts * 5]
    with pytest.warns(UserWarning, match="the classes 'Sport', 'sport', 'sport ' differ in case or spaces alone"):
        assert len(read(write_jsonl(tmp_path / "train.jsonl", rows)).labels.names) == 4


def test_classes_that_look_like_measures_are_told(tmp_path: Path) -> None:
    rows = ["text,score", *(f"good,{value}" for value in ("0.5", "1", "2.25") * 5)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    with pytest.warns(UserWarning, match="numbers with decimals, and each of 3 is learned as a class of its own"):
        read(tmp_path / "train.csv")


def test_one_class_alone_is_told_with_file_and_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "good", "label": "a"}] * 5)
    with pytest.raises(DataError, match=r"train\.jsonl, column 'label': the training labels hold 'a' and no other"):
        read(path)


def test_rows_of_other_splits_that_training_has_are_noted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = [{"text": f"good {j}", "label": j % 2} for j in range(8)]
    held_out, test = ([{"text": f"good {j}", "label": 0} for j in rows] for rows in ((8, 9), (1, 9, 3)))
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", train), ("b", held_out), ("c", test))
    ]
    splits = read(paths[0], validation=str(paths[1]), test=str(paths[2]))
    assert prepare(splits, tokenizer, max_length=8).notes == (
        "2 of 3 test rows are training rows, too: what is measured on them says little of new ones",
    )


def test_a_class_that_training_lacks_is_an_error_of_the_other_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(10, labels=("a", "b")))
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "good", "label": "c"}])
    splits = read(train, validation=str(other))
    assert splits.labels == LabelMap(("a", "b"))
    with pytest.raises(DataError, match=r"other\.jsonl:1: label 'c' is not among"):
        prepare(splits, tokenizer, max_length=8)


@pytest.mark.parametrize("label", [-1, "-1", None, " "])
def test_a_test_split_without_labels_that_was_not_asked_for_is_left_out_and_told(label: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(12))
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": label}] * 3)
    with pytest.warns(UserWarning, match=r"test\.jsonl has no labels in column 'label': it is left out"):
        assert set(read(tmp_path).rows) == {"train", "validation"}
    assert set(read(tmp_path, test=str(test)).rows) == {"train", "validation", "test"}  # whoever asks for it is told
    write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": label}, {"text": "good", "label": 1}])
    assert "test" in read(tmp_path).rows


def test_rows_without_a_label_column_name_the_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "good", "mood": 1}] * 3)
    with pytest.raises(DataError, match=r"no label column; name it in data\.label\. Columns: text, mood"):
        read(path)


def test_a_target_that_is_no_number_is_told_before_anything_is_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*make_rows(10), {"text": "good", "label": "warm"}])
    with pytest.raises(DataError, match=r"train\.jsonl:11: label 'warm' in column 'label' is no finite number"):
        read(path, classes=False)
    assert read(write_jsonl(path, make_rows(10)), classes=False).labels is None


def test_the_hash_names_every_row_of_every_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def hash_of(rows: list[dict[str, Any]], **options: Any) -> str:
        return prepare(read(write_jsonl(tmp_path / "train.jsonl", rows), **options), tokenizer, max_length=8).hash

    rows = make_rows(20)
    changed = [*rows[:-1], {**rows[-1], "label": 0}]
    hashes = [hash_of(rows), hash_of(changed), hash_of(rows[::-1]), hash_of(rows, seed=1)]
    assert len(set(hashes)) == 4
    assert hash_of(rows) == hashes[0]
    assert len(hashes[0]) == 16


def test_samples_without_labels_need_no_label_column(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    splits = read(write_jsonl(tmp_path / "train.jsonl", make_rows(8)))
    options: dict[str, Any] = {"max_length": 8, "labelled": False}
    samples = encode(splits.rows["train"], splits.columns, splits.labels, tokenizer, **options)
    assert all("labels" not in sample for sample in samples.samples)


@pytest.mark.parametrize(
    ("asked", "tokenizer_limit", "positions", "length"),
    [(None, 128, 512, 128), (None, 10**30, 512, 512), (None, 128, None, 128), (64, 128, 512, 64), (400, 128, 512, 400)],
)
def test_the_length_is_what_is_asked_else_the_least_limit(
    asked: int | None, tokenizer_limit: int, positions: int | None, length: int
) -> None:
    assert resolve_max_length(asked, tokenizer_limit=tokenizer_limit, positions=positions) == length


def test_a_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"data\.max_length 600 is above the model's 512 positions; lower it"):
        resolve_max_length(600, tokenizer_limit=512, positions=512)
    with pytest.raises(SettingsError, match=r"set data\.max_length"):
        resolve_max_length(None, tokenizer_limit=10**30, positions=None)
