import math
from typing import Any

import pytest

from tables import rows_of
from tsqlora.errors import DataError
from tsqlora.rows.labels import (
    SET,
    LabelMap,
    classes_of,
    distinct_labels,
    encode_labels,
    encode_targets,
    join_labels,
    look_alikes,
    several_of,
)
from tsqlora.rows.rows import Row


def labelled(*values: Any) -> list[Row]:
    return rows_of(*({"label": value} for value in values), first=11)


def read_labels(*values: Any, typed: bool = True) -> list[Any]:
    labels, groups, _ = distinct_labels(labelled(*values), "label", typed=typed)
    return [labels[j] for j in groups]


def classes(values: list[Any]) -> LabelMap:
    return classes_of(values, "train.jsonl", "label")


def test_text_sorts_as_text_and_integers_as_numbers() -> None:
    assert classes(["b", "10", "9"]).names == ("10", "9", "b")
    assert classes([10, 9, -1]).names == (-1, 9, 10)
    with pytest.raises(DataError, match=r"train\.jsonl, column 'label': 'pos' is the only class"):
        classes(["pos"])


def test_labels_become_their_ids() -> None:
    rows = labelled("pos", "neg", "pos")
    labels, places, _ = distinct_labels(rows, "label")
    assert (labels, places.tolist()) == (["pos", "neg"], [0, 1, 0])
    assert encode_labels(rows, "label", classes(labels)) == [1, 0, 1]


def test_integers_in_a_csv_are_integer_labels() -> None:
    rows = labelled("10", "9", "-1")
    made = classes(distinct_labels(rows, "label", typed=False)[0])
    assert made.names == (-1, 9, 10)
    assert encode_labels(rows, "label", made) == [2, 1, 0]


@pytest.mark.parametrize("other", ["a", "01", "+1", "1.5", "²"])
def test_one_label_in_a_csv_that_is_no_integer_makes_all_text(other: str) -> None:
    assert read_labels("10", other, typed=False) == ["10", other]


def test_text_labels_of_a_typed_format_stay_text() -> None:
    assert read_labels("10", "9") == ["10", "9"]


def test_a_csv_fits_a_map_made_of_json_integers() -> None:
    assert encode_labels(labelled("3", "1"), "label", LabelMap((1, 3))) == [1, 0]


def test_whole_numbers_are_classes_however_a_file_writes_them() -> None:
    """pandas writes integers as 1.0 where a cell is empty."""
    assert read_labels("1.0", "0", "1", typed=False) == [1, 0, 1]
    assert read_labels(1.0, 0.0, 1) == [1, 0, 1]
    assert encode_labels(labelled("1.0", 0.0, "1", 1), "label", LabelMap((0, 1))) == [1, 0, 1, 1]


def test_true_and_false_are_classes() -> None:
    assert read_labels(True, False) == ["True", "False"]
    assert encode_labels(labelled(True, "False"), "label", LabelMap(("False", "True"))) == [1, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((missing, "no label in column 'label'") for missing in (None, "", "  ", math.nan)),
        ("bad", "label 'bad' is not among the training data's classes: 'neg', 'pos'"),
        (["a", "b"], "column 'label' holds the list ['a', 'b']"),
        (True, "label 'True' is not among the training data's classes"),
        (0.5, "column 'label' holds the float 0.5"),
    ],
)
def test_what_is_no_class_is_named_with_file_and_row(value: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_labels(labelled("pos", value), "label", LabelMap(("neg", "pos")))
    assert f"train.jsonl:12: {message}" in str(caught.value)


def test_of_many_classes_the_first_are_listed() -> None:
    with pytest.raises(DataError, match=r"0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        encode_labels(labelled(100), "label", LabelMap(tuple(range(100))))


def test_several_labels_are_a_list_or_text_with_bars() -> None:
    rows = labelled(["joy", "love"], "love | anger", [], "joy")
    names, groups, _ = distinct_labels(rows, "label", SET)
    assert (names, groups.tolist()) == (["joy", "love", "anger"], [0, 0, 0, 0])
    made = classes_of(names, "train.jsonl", "label", SET)
    assert encode_labels(rows, "label", made) == [[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    numbers = classes_of(distinct_labels(labelled("3|1", "1"), "label", SET, typed=False)[0], "", "", SET)
    assert encode_labels(labelled([1], 3), "label", numbers) == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["[0, 3]", "[3]", "[]", "[0, 1]"], [0, 3, 1]),
        (["['joy', 'love']", '["love"]', "[]"], ["joy", "love"]),
        (["0|3", "3", "1 | 0"], [0, 3, 1]),
        ([[0.0, 3.0], [3]], [0, 3]),
    ],
)
def test_lists_are_sets_of_labels_however_a_file_writes_them(cells: list[Any], names: list[Any]) -> None:
    assert distinct_labels(labelled(*cells), "label", SET, typed=False)[0] == names
    assert several_of([{"text": "a", "label": cell} for cell in cells]) == SET
    assert several_of([{"tokens": "['a', 'b']", "tags": "['O', 'B-x']"}]) not in (SET, None)


@pytest.mark.parametrize("cells", [["a", "b|c", "a"], ["a", "b", None], [0, 1, 0], [0.5, 0.1]])
def test_one_label_a_row_is_no_set(cells: list[Any]) -> None:
    assert several_of([{"text": "a", "label": cell} for cell in cells]) is None


@pytest.mark.parametrize(
    ("cell", "text"),
    [([0.9, None, 0.5], "0.9||0.5"), ([None], ""), ([], ""), (["O", "B"], "O|B"), ([3], "3"), ("a", "a"), (None, None)],
)
def test_a_list_is_joined_with_nothing_for_none(cell: Any, text: str | None) -> None:
    assert join_labels(cell) == text


@pytest.mark.parametrize(
    "value", ["joy|bad", ["joy", None], ["joy", ""], "['joy' 'love']", "[joy]", 0.5, {"joy": 1}, None]
)
def test_what_is_no_set_of_labels_is_named_with_file_and_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:12: "):
        encode_labels(labelled(["joy"], value), "label", LabelMap(("joy", "love"), SET))


def test_targets_are_numbers_however_they_are_written() -> None:
    assert encode_targets(labelled(1, 0.5, "2.5", "-1e-3"), "label") == [1.0, 0.5, 2.5, -0.001]


@pytest.mark.parametrize("value", ["good", "inf", math.inf, [1.0], 10**400, True, None, ""])
def test_targets_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:12: label "):
        encode_targets(labelled(1.0, value), "label")


@pytest.mark.parametrize(("value", "cure"), [("5,00", "5.00"), ("n/a", "empty"), ("good", "sequence-classification")])
def test_what_is_no_number_is_cured_by_what_it_looks_like(value: str, cure: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_targets(labelled(1.0, value), "label")
    assert cure in str(caught.value)
    assert ("sequence-classification" in str(caught.value)) == (value == "good")


def test_all_rows_without_a_number_are_listed() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:12: .* nor in 2 more rows: 13, 15; correct it, empty the cell"):
        encode_targets(labelled(1.0, "k.A.", "?", 2.0, "-"), "label")


def test_spellings_that_look_alike_are_grouped() -> None:
    names = ("caf\u00e9", "cafe", "cafe\u0301", "Sport", "sport ", "\uff33port", 3)
    assert look_alikes(names) == [("caf\u00e9", "cafe\u0301"), ("Sport", "sport ", "\uff33port")]


def test_labels_of_two_kinds_are_message_with_the_first_place_of_the_second() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:13: the label '1'"):
        read_labels(0, 1, "1", 0, "0", 1)
