import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.data.labels import LabelMap, distinct_labels, encode_labels, encode_targets
from tsqlora.data.rows import Rows
from tsqlora.errors import DataError


def labelled(*values: Any, typed: bool = True) -> Rows:
    rows = tuple({"label": value} for value in values)
    return Rows(rows, "train.jsonl", tuple(range(11, 11 + len(rows))), typed)


def read_labels(rows: Rows) -> list[Any]:
    labels, places = distinct_labels([rows], "label")
    return [labels[j] for j in places]


def encode_error(*values: Any) -> str:
    with pytest.raises(DataError) as caught:
        encode_labels(labelled(*values), "label", LabelMap(("neg", "pos")))
    return str(caught.value)


def target_error(*values: Any) -> str:
    with pytest.raises(DataError) as caught:
        encode_targets(labelled(*values), "label")
    return str(caught.value)


def test_text_sorts_as_text_and_integers_as_numbers() -> None:
    made = LabelMap.from_rows(["10", "9", "b", "10"])
    assert made.names == ("10", "9", "b")
    assert [made.id_of(name) for name in made.names] == [0, 1, 2]
    assert LabelMap.from_rows([10, 9, -1, 10]).names == (-1, 9, 10)


@given(st.permutations(["a", "b", "c", "a"]))
def test_a_map_does_not_depend_on_the_order_of_the_rows(values: list[str]) -> None:
    assert LabelMap.from_rows(values).names == ("a", "b", "c")


def test_labels_become_their_ids() -> None:
    rows = labelled("pos", "neg", "pos")
    assert encode_labels(rows, "label", LabelMap.from_rows(read_labels(rows))) == [1, 0, 1]


def test_integers_in_a_csv_are_integer_labels() -> None:
    rows = labelled("10", "9", "-1", typed=False)
    made = LabelMap.from_rows(read_labels(rows))
    assert made.names == (-1, 9, 10)
    assert encode_labels(rows, "label", made) == [2, 1, 0]


@pytest.mark.parametrize("other", ["a", "01", "+1", "1.0", "²"])
def test_one_label_in_a_csv_that_is_no_integer_makes_all_text(other: str) -> None:
    assert read_labels(labelled("10", other, typed=False)) == ["10", other]


def test_text_labels_of_a_typed_format_stay_text() -> None:
    assert read_labels(labelled("10", "9")) == ["10", "9"]


def test_a_csv_fits_a_map_made_of_json_integers() -> None:
    assert encode_labels(labelled("3", "1", typed=False), "label", LabelMap((1, 3))) == [1, 0]


@pytest.mark.parametrize("missing", [None, "", "  ", math.nan])
def test_a_missing_label_is_named_with_file_and_row(missing: Any) -> None:
    assert "train.jsonl:12: no label in column 'label'" in encode_error("pos", missing)
    assert "train.jsonl:12: no label in column 'label'" in target_error(1.0, missing)


def test_all_rows_without_a_label_are_counted_and_the_first_named() -> None:
    values = ("a", None, "b", "", None, None, None, None, None)
    assert "train.jsonl:12: no label in column 'label', nor in 6 more rows (14, 15, 16, 17, 18, …)" in encode_error(
        *values
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (("pos", "neg", "bad"), "train.jsonl:13: label 'bad' is not among the training data's classes: 'neg', 'pos'"),
        ((["a", "b"],), "train.jsonl:11: the list ['a', 'b'] as a label in column 'label'"),
        ((True,), "train.jsonl:11: the boolean label True in column 'label'"),
        ((0.5,), "train.jsonl:11: the float label 0.5 in column 'label'"),
    ],
)
def test_what_is_no_class_is_named_with_file_and_row(values: tuple[Any, ...], told: str) -> None:
    assert told in encode_error(*values)


def test_a_row_without_the_column_has_no_label() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:11: no label in column 'class'"):
        encode_labels(labelled("pos"), "class", LabelMap(("neg", "pos")))


def test_of_many_classes_the_first_are_listed() -> None:
    with pytest.raises(DataError, match=r"0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        LabelMap(tuple(range(100))).id_of(100)


@pytest.mark.parametrize(
    ("values", "told"),
    [((True, 0), "the boolean label True"), (("a", 1), "'a'"), (("pos", "pos"), "'pos'")],
)
def test_what_makes_no_map_is_refused(values: tuple[Any, ...], told: str) -> None:
    with pytest.raises(DataError, match=told):
        LabelMap.from_rows(values)


def test_a_boolean_is_no_class_even_where_1_is_one() -> None:
    with pytest.raises(DataError, match="the boolean label"):
        LabelMap((0, 1)).id_of(True)


def test_targets_are_numbers_however_they_are_written() -> None:
    assert encode_targets(labelled(1, 0.5, "2.5", "-1e-3"), "label") == [1.0, 0.5, 2.5, -0.001]


@pytest.mark.parametrize("value", ["good", "inf", math.inf, [1.0], 10**400, True])
def test_targets_that_are_no_numbers_are_refused(value: Any) -> None:
    assert "train.jsonl:12: label " in target_error(1.0, value)


def test_labels_of_two_kinds_are_told_with_the_rarer_ones_first_place() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:13: the label '1' .* 2 of 6 rows"):
        read_labels(labelled(0, 1, "1", 0, "0", 1))
