from collections.abc import Sequence

import pytest

from tsqlora.errors import DataError
from tsqlora.rows.rows import USUAL_LABEL, USUAL_PAIR, USUAL_TEXT, Columns, find_columns


def find(
    names: Sequence[str], text: str | None = None, text_pair: str | None = None, label: str | None = None
) -> Columns:
    return find_columns(names, text=text, text_pair=text_pair, label=label, source="train.csv")


@pytest.mark.parametrize("text", USUAL_TEXT)
@pytest.mark.parametrize("label", USUAL_LABEL)
def test_usual_names_are_found_by_themselves(text: str, label: str) -> None:
    assert find(["id", label, text]) == Columns(text, None, label)


@pytest.mark.parametrize(("text", "pair"), USUAL_PAIR.items())
def test_a_pair_is_found_beside_its_partner(text: str, pair: str) -> None:
    assert find(["label", pair, text]) == Columns(text, pair, "label")


def test_earlier_usual_names_win() -> None:
    assert find(["category", "label", "review", "text"]) == Columns("text", None, "label")


def test_a_pair_without_its_partner_is_left_alone() -> None:
    assert find(["text", "sentence2", "hypothesis", "answer", "label"]).text_pair is None


def test_a_column_without_a_name_is_no_pair_and_blanks_around_names_hide_none() -> None:
    for text in USUAL_TEXT:
        assert find(["", text, "label"]).text_pair is None
    assert find(["sentence1 ", " sentence2", "label"]) == Columns("sentence1 ", " sentence2", "label")


def test_named_columns_win_over_usual_ones() -> None:
    names = ["text", "label", "body", "title", "verdict"]
    assert find(names, "body", "title", "verdict") == Columns("body", "title", "verdict")
    assert find(names, "body") == Columns("body", None, "label")


def test_naming_the_text_alone_means_one_text() -> None:
    assert find(["sentence1", "sentence2", "label"], text="sentence1").text_pair is None


def test_a_column_serves_once() -> None:
    assert find(["question", "answer", "label"], label="answer") == Columns("question", None, "answer")
    assert find(["text", "category"], text="category").label is None
    assert find(["text", "sentence"], text_pair="text").text == "sentence"


def test_no_label_is_no_error() -> None:
    assert find(["text"]) == Columns("text", None, None)


@pytest.mark.parametrize("column", [" Body ", "BODY", "body "])
def test_case_and_blanks_of_a_column_need_not_be_typed(column: str) -> None:
    assert find(["id", column, " Label"], "body") == Columns(column, None, " Label")


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["text", "labels"], {"label": "labls"}, ["'labls'", "data.label", "mean 'labels'"]),
        (["Body ", "BODY"], {"text": "body"}, ["'body'", "data.text"]),
        (["Text"], {"text": "text", "label": "TEXT"}, ["data.text and data.label", "'Text'"]),
        (["text"], {"text": "text", "label": "text"}, ["data.text and data.label", "'text'"]),
        (["body", "label"], {}, ["data.text", "'body', 'label'"]),
    ],
)
def test_what_cannot_be_is_refused(names: list[str], settings: dict[str, str], message: list[str]) -> None:
    with pytest.raises(DataError, match=r"train\.csv") as caught:
        find(names, **settings)
    assert all(name in str(caught.value) for name in message)


@pytest.mark.parametrize(
    "names", [["ID0", "A long text that no one would give a column as its name", "sport"], ["so", "1"]]
)
def test_a_first_row_in_place_of_names_is_taken_for_one(names: list[str]) -> None:
    with pytest.raises(DataError, match="is the line with the names of the columns missing") as caught:
        find(names)
    assert "A long text that no one would give" not in str(caught.value)
    with pytest.raises(DataError, match="has no text column; set data"):
        find(["body", "verdict"])
