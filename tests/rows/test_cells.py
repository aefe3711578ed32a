from tsqlora.rows.rows import Columns, row_text

COLUMNS = Columns("a", "b", "c")


def test_a_rows_text_is_that_of_its_columns_line_by_line() -> None:
    assert row_text({"a": "x", "b": "y", "c": "z"}, COLUMNS) == "x\ny"
    assert row_text({"a": "x"}, COLUMNS) == row_text({"a": "x", "b": None}, COLUMNS) == "x"
    assert row_text({"a": "x", "b": "y"}, Columns("a", None, None)) == "x"


def test_a_chat_has_a_line_a_message() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert row_text({"a": chat}, COLUMNS) == "user: hi\nassistant: ho"
    assert row_text({"a": ["hi", 3]}, COLUMNS) == "hi\n3"
