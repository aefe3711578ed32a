from collections.abc import Sequence
from typing import Any

import pytest

from tsqlora.errors import DataError
from tsqlora.rows.rows import USUAL_LABEL, USUAL_PAIR, USUAL_TEXT, Columns, find_columns, row_text


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


def test_a_column_without_a_name_is_no_pair_and_blanks_around_names_hide_none() -> None:
    for text in USUAL_TEXT:
        assert find(["", text, "label"]).text_pair is None
    assert find(["sentence1 ", " sentence2", "label"]) == Columns("sentence1 ", " sentence2", "label")


@pytest.mark.parametrize(
    ("names", "settings", "columns"),
    [
        # Earlier usual names win, a pair counts only beside its partner, and no label is no error.
        ("category label review text", {}, ("text", None, "label")),
        ("text sentence2 hypothesis answer label", {}, ("text", None, "label")),
        ("text", {}, ("text", None, None)),
        # Named columns win over usual ones, and naming the text alone means one text.
        ("text label body title verdict", {"text": "body", "text_pair": "title", "label": "verdict"},
         ("body", "title", "verdict")),
        ("text label body title verdict", {"text": "body"}, ("body", None, "label")),
        ("sentence1 sentence2 label", {"text": "sentence1"}, ("sentence1", None, "label")),
        # A column serves once.
        ("question answer label", {"label": "answer"}, ("question", None, "answer")),
        ("text category", {"text": "category"}, ("category", None, None)),
        ("text sentence", {"text_pair": "text"}, ("sentence", "text", None)),
        # Case and blanks need not be typed.
        ("id BODY Label", {"text": "body"}, ("BODY", None, "Label")),
    ],
)  # fmt: skip
def test_columns_follow_from_names_and_settings(names: str, settings: dict[str, str], columns: Any) -> None:
    assert find(names.split(), **settings) == Columns(*columns)


@pytest.mark.parametrize("column", [" Body ", "body "])
def test_blanks_of_a_column_need_not_be_typed(column: str) -> None:
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


def test_a_rows_text_is_that_of_its_columns_line_by_line_and_of_a_chat_a_line_a_message() -> None:
    columns, chat = Columns("a", "b", "c"), [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert row_text({"a": "x", "b": "y", "c": "z"}, columns) == "x\ny"
    assert row_text({"a": "x"}, columns) == row_text({"a": "x", "b": None}, columns) == "x"
    assert row_text({"a": chat, "b": ["hi", 3]}, columns) == "user: hi\nassistant: ho\nhi\n3"
