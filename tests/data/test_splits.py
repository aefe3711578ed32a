"""Files become splits; classes come from the training rows alone; a share of these is held out."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import make_rows, write_jsonl
from tsqlora.data.labels import LabelMap
from tsqlora.data.splits import Splits, held_out, read_data
from tsqlora.errors import DataError

GROUPS = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=2, max_size=60).map(
    lambda groups: np.unique(groups, return_inverse=True)[1]
)
FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)


def read(train: Path, **options: Any) -> Splits:
    defaults: dict[str, Any] = {"validation": None, "test": None, "answer": "class", "columns": {}}
    columns = dict.fromkeys(("text", "text_pair", "label"))
    defaults |= {"columns": columns, "validation_fraction": 0.25, "seed": 0}
    return read_data(str(train), **(defaults | options))


def error(train: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(train, **options)
    return str(caught.value)


# The share held out


@given(GROUPS, FRACTIONS, SEEDS)
def test_a_share_is_held_out_and_one_row_stays(groups: np.ndarray, fraction: float, seed: int) -> None:
    alike = np.zeros_like(groups)
    out = held_out(alike, fraction=fraction, seed=seed, source="")
    assert out.sum() == min(max(1, round(fraction * len(groups))), len(groups) - 1)


@given(GROUPS, FRACTIONS, SEEDS)
def test_classes_keep_their_shares_and_stay_in_training(groups: np.ndarray, fraction: float, seed: int) -> None:
    counts = Counter(groups.tolist())
    if max(counts.values()) == 1:
        return
    out = held_out(groups, fraction=fraction, seed=seed, source="")
    assert set(groups[~out].tolist()) == set(counts)
    taken = Counter(groups[out].tolist())
    assert taken
    if all(count * (1 - fraction) >= 2 for count in counts.values()):
        assert all(abs(taken[group] - count * fraction) < 1 for group, count in counts.items())


def test_what_the_floors_leave_goes_to_the_largest_remainder() -> None:
    groups = np.array([0] * 7 + [1] * 3)
    assert Counter(groups[held_out(groups, fraction=0.3, seed=0, source="")].tolist()) == {0: 2, 1: 1}


@pytest.mark.parametrize("groups", [[0], [0, 1, 2]])
def test_rows_that_cannot_be_split_are_refused(groups: list[int]) -> None:
    with pytest.raises(DataError, match=r"train.csv .* data.validation"):
        held_out(np.array(groups), fraction=0.5, seed=0, source="train.csv")


# Splits of files


def test_without_validation_a_share_of_the_training_rows_is_taken_class_by_class(tmp_path: Path) -> None:
    splits = read(write_jsonl(tmp_path / "train.jsonl", make_rows(40)))
    train, validation = (splits.rows(name) for name in ("train", "validation"))
    assert (len(train), len(validation), splits.held_out) == (30, 10, 10)
    assert sum(row["label"] for row in validation.rows) == 5
    assert sorted(train.numbers + validation.numbers) == list(range(1, 41))


def test_the_seed_decides_the_validation_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", make_rows(40))
    numbers = [read(path, seed=seed).rows("validation").numbers for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_named_validation_file_leaves_the_training_rows_whole(tmp_path: Path) -> None:
    train, other = (write_jsonl(tmp_path / f"{n}.jsonl", make_rows(n)) for n in (40, 6))
    splits = read(train, validation=str(other), test=str(other))
    assert {name: len(places) for name, places in splits.places.items()} == {"train": 40, "validation": 6, "test": 6}
    assert splits.held_out == 0
    assert splits.labels == LabelMap((0, 1))


def test_classes_that_differ_in_case_or_spaces_alone_are_warned_of(tmp_path: Path) -> None:
    rows = [{"text": "good", "label": label} for label in ("Sport", "sport ", "news", "sport") * 5]
    with pytest.warns(UserWarning, match="'Sport', 'sport', 'sport '"):
        assert len(read(write_jsonl(tmp_path / "train.jsonl", rows)).labels.names) == 4  # type: ignore[union-attr]


def test_classes_that_look_like_measures_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("\n".join(["text,score", *(f"good,{v}" for v in ("0.5", "1", "2.25") * 5)]))
    with pytest.warns(UserWarning, match="regression"):
        read(tmp_path / "train.csv")


@pytest.mark.parametrize("label", [-1, "-1", None, " "])
def test_a_test_split_without_labels_that_was_not_asked_for_is_left_out(label: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(12))
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": label}] * 3)
    with pytest.warns(UserWarning, match=r"test\.jsonl .*'label'.* left out"):
        assert set(read(tmp_path).sources) == {"train", "validation"}
    if label in (-1, "-1"):
        assert "test" in read(tmp_path, test=str(test)).sources  # prepare refuses these labels
    else:
        assert "test.jsonl: 3 of 3 rows" in error(tmp_path, test=str(test))
    write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": -1}, {"text": "good", "label": 1}])
    assert "test" in read(tmp_path).sources


@pytest.mark.parametrize(
    ("rows", "answer", "told"),
    [
        ([{"text": "good", "mood": 1}] * 3, "class", "train.jsonl has no label column; name it in data.label"),
        ([{"text": "good", "label": "a"}] * 5, "class", "train.jsonl, column 'label': 'a' is the only class"),
        ([*make_rows(10), {"text": "good", "label": "warm"}], "class", "train.jsonl:11: the label 'warm'"),
        ([*make_rows(10), {"text": "good", "label": "warm"}], "number", "train.jsonl:11: label 'warm'"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_split(rows: Any, answer: str, told: str, tmp_path: Path) -> None:
    assert told in error(write_jsonl(tmp_path / "train.jsonl", rows), answer=answer)


def test_of_texts_the_target_is_part_of_the_text(tmp_path: Path) -> None:
    """Or rows of one prompt with different answers would be each other's duplicates."""
    rows = [{"prompt": "Write a haiku.", "completion": f"Haiku {n}."} for n in range(4)]
    columns = dict.fromkeys(("format", "prompt", "target", "messages", "text"))
    splits = read(write_jsonl(tmp_path / "train.jsonl", rows), answer="text", columns=columns)
    assert len(set(splits.texts("train"))) == 3
