import json
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


def map_error(*values: Any) -> str:
    with pytest.raises(DataError) as caught:
        LabelMap.from_rows(values)
    return str(caught.value)


def test_text_sorts_as_text_and_integers_as_numbers() -> None:
    assert LabelMap.from_rows(["10", "9", "b", "10"]).names == ("10", "9", "b")
    assert LabelMap.from_rows([10, 9, -1, 10]).names == (-1, 9, 10)


@given(st.sets(st.integers(), min_size=2) | st.sets(st.text(min_size=1).filter(str.strip), min_size=2))
def test_a_map_is_the_same_after_json(values: set[Any]) -> None:
    made = LabelMap.from_rows(values)
    again = LabelMap.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert [again.id_of(name) for name in made.names] == list(range(len(values)))


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
    wanted = "train.jsonl:12: no label in column 'label'; fill it in or leave the row out"
    assert encode_error("pos", missing) == wanted
    with pytest.raises(DataError) as caught:
        encode_targets(labelled(1.0, missing), "label")
    assert str(caught.value) == wanted


def test_all_rows_without_a_label_are_told_at_once() -> None:
    wanted = (
        "train.jsonl:12: no label in column 'label', nor in 6 more rows (14, 15, 16, 17, 18, …); "
        "fill them in or leave the rows out"
    )
    values = (1.0, None, 2.0, "", None, None, None, None, None)
    assert encode_error(*(value if value is None else str(value) for value in values)) == wanted
    with pytest.raises(DataError) as caught:
        encode_targets(labelled(*values), "label")
    assert str(caught.value) == wanted


def test_a_row_without_the_column_has_no_label() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:11: no label in column 'class'"):
        encode_labels(labelled("pos"), "class", LabelMap(("neg", "pos")))


def test_an_unknown_label_is_named_with_the_known_ones() -> None:
    assert encode_error("pos", "neg", "bad") == (
        "train.jsonl:13: label 'bad' is not among the training data's classes: 'neg', 'pos'; "
        "correct it, or add the class to the training data"
    )
    many = LabelMap(tuple(range(100)))
    with pytest.raises(DataError, match=r"classes: 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        many.id_of(100)


def test_a_list_is_refused_as_multi_label() -> None:
    assert encode_error(["a", "b"]) == (
        "train.jsonl:11: the list ['a', 'b'] as a label in column 'label'; multi-label classification is not built"
    )


@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_no_classes_even_where_1_is_one(value: bool) -> None:
    assert f"the boolean label {value} in column 'label'; write 0 and 1, or names" in encode_error(value)
    assert map_error(value, 0).startswith(f"the boolean label {value}; ")
    with pytest.raises(DataError, match="the boolean label"):
        LabelMap((0, 1)).id_of(value)
    with pytest.raises(DataError, match="is no finite number"):
        encode_targets(labelled(value), "label")


def test_floats_are_no_classes() -> None:
    assert encode_error(0.5) == (
        "train.jsonl:11: the float label 0.5 in column 'label'; "
        "write classes as text or integers, or set task.type to regression"
    )


def test_text_beside_integers_is_refused() -> None:
    assert map_error("a", 1) == "labels mix text ('a') and integers (1); write all as one kind"


def test_a_class_alone_is_refused() -> None:
    assert map_error("pos", "pos") == ("the training labels hold 'pos' and no other class; at least two are needed")


def test_targets_are_numbers_however_they_are_written() -> None:
    assert encode_targets(labelled(1, 0.5, "2.5", "-1e-3"), "label") == [1.0, 0.5, 2.5, -0.001]


@pytest.mark.parametrize("value", ["good", "inf", math.inf, [1.0], 10**400])
def test_targets_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:12: label .* in column 'label' is no finite number; "):
        encode_targets(labelled(1.0, value), "label")


def test_labels_of_two_kinds_are_told_with_the_rarer_ones_first_place() -> None:
    rows = Rows(tuple({"label": value} for value in (0, 1, "1", 0, "0", 1)), "a.jsonl", (1, 2, 3, 4, 5, 6))
    with pytest.raises(DataError) as caught:
        read_labels(rows)
    assert str(caught.value) == (
        "a.jsonl:3: the label '1' in column 'label' is text, as in 2 of 6 rows, and the others are integers; write all "
        "as one kind"
    )
