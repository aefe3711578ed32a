from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.data.rows import Rows
from tsqlora.data.split import split_rows
from tsqlora.errors import DataError, SettingsError

LABELS = st.lists(st.sampled_from("aaab") | st.just("c"), min_size=2, max_size=60)
FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)


def labelled(labels: Any) -> Rows:
    rows = tuple({"text": str(i), "label": label} for i, label in enumerate(labels))
    return Rows(rows, "train.csv", tuple(range(2, 2 + len(rows))), typed=False)


@given(LABELS, FRACTIONS, SEEDS)
def test_every_row_is_on_one_side_with_its_number(labels: list[str], fraction: float, seed: int) -> None:
    rows = labelled(labels)
    train, validation = split_rows(rows, fraction=fraction, seed=seed, label=None)
    both = sorted(
        [
            *zip(train.numbers, train.rows, strict=True),
            *zip(validation.numbers, validation.rows, strict=True),
        ],
        key=lambda pair: pair[0],
    )
    assert both == list(zip(rows.numbers, rows.rows, strict=True))
    assert len(train) >= 1
    assert len(validation) == min(max(1, round(fraction * len(rows))), len(rows) - 1)
    assert list(train.numbers) == sorted(train.numbers)
    assert (train.source, train.typed) == (rows.source, rows.typed)


@given(LABELS, FRACTIONS, SEEDS)
def test_classes_keep_their_shares_and_stay_in_training(labels: list[str], fraction: float, seed: int) -> None:
    counts = Counter(labels)
    if max(counts.values()) == 1:
        return
    train, validation = split_rows(labelled(labels), fraction=fraction, seed=seed, label="label")
    assert {row["label"] for row in train.rows} == set(labels)
    assert len(validation) >= 1
    held_out = Counter(row["label"] for row in validation.rows)
    if all(count * (1 - fraction) >= 2 for count in counts.values()):
        assert all(abs(held_out[name] - count * fraction) < 1 for name, count in counts.items())


def test_what_the_floors_leave_goes_to_the_largest_remainder() -> None:
    _, validation = split_rows(labelled("a" * 7 + "b" * 3), fraction=0.3, seed=0, label="label")
    assert Counter(row["label"] for row in validation.rows) == {"a": 2, "b": 1}


def test_the_same_seed_gives_the_same_split_and_another_gives_another() -> None:
    rows = labelled("ab" * 20)
    splits = [split_rows(rows, fraction=0.3, seed=seed, label="label")[1].numbers for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_labels_that_cannot_be_hashed_are_left_to_whoever_reads_them() -> None:
    _, validation = split_rows(labelled([["a"], ["a"], None, None]), fraction=0.5, seed=0, label="label")
    assert len(validation) == 2


@pytest.mark.parametrize(("labels", "label"), [("a", None), ("abc", "label")])
def test_rows_that_cannot_be_split_are_refused(labels: str, label: str | None) -> None:
    with pytest.raises(DataError, match=r"train.csv has too few rows .* name one in data.validation"):
        split_rows(labelled(labels), fraction=0.5, seed=0, label=label)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_that_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(SettingsError, match=r"validation fraction .* is not between 0 and 1; set a share"):
        split_rows(labelled("ab"), fraction=fraction, seed=0, label=None)
