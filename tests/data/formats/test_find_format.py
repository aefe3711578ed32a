"""Which format a file has follows from its columns and the settings."""

from typing import Any

import pytest

from tsqlora.data.columns import Columns
from tsqlora.data.formats import FORMATS, Format, find_format
from tsqlora.errors import DataError, SettingsError, TsqLoraError


def find(*names: str, **settings: Any) -> Format:
    return find_format(names, source="train.jsonl", **settings)


def error(kind: type[TsqLoraError], *names: str, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        find(*names, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "format", "columns"),
    [
        (("instruction", "input", "output"), "alpaca", Columns("instruction", "input", "output")),
        (("instruction", "output"), "alpaca", Columns("instruction", None, "output")),
        (("instruction", "context", "response", "category"), "alpaca", Columns("instruction", "context", "response")),
        (("prompt", "completion"), "prompt", Columns("prompt", None, "completion")),
        (("id", "question", "answer"), "prompt", Columns("question", None, "answer")),
        (("messages",), "messages", Columns("messages", None, None)),
        (("id", "conversations"), "sharegpt", Columns("conversations", None, None)),
        (("document", "summary"), "document", Columns("document", None, "summary")),
        (("article", "highlights"), "document", Columns("article", None, "highlights")),
        (("source", "target"), "document", Columns("source", None, "target")),
        (("text", "target"), "document", Columns("text", None, "target")),
        (("prompt", "target"), "prompt", Columns("prompt", None, "target")),
        (("text",), "text", Columns("text", None, None)),
        (("text", "label"), "text", Columns("text", None, None)),
    ],
)
def test_usual_names_are_found(names: tuple[str, ...], format: str, columns: Columns) -> None:
    assert find(*names) == find(*reversed(names)) == Format(format, columns)


@pytest.mark.parametrize("name", FORMATS)
def test_every_usual_pair_is_found_and_by_its_format(name: str) -> None:
    for prompt, target in FORMATS[name].usual:
        names = [prompt] if target is None else [prompt, target]
        assert find(*names) == find(*names, format=name) == Format(name, Columns(prompt, None, target))


def test_what_is_most_telling_wins() -> None:
    """The text beside a chat or an instruction is the same in one piece."""
    assert find("text", "messages").name == "messages"
    assert find("text", "instruction", "output").name == "alpaca"
    assert find("text", "summary").name == "document"


def test_named_columns_win() -> None:
    names = ("prompt", "completion", "q", "a", "text", "chat")
    assert find(*names, prompt="q", target="a") == Format("prompt", Columns("q", None, "a"))
    assert find(*names, text="q") == Format("text", Columns("q", None, None))
    assert find(*names, messages="chat") == Format("messages", Columns("chat", None, None))
    assert find("conversation", "messages", messages="conversation").name == "sharegpt"


def test_one_named_column_finds_its_usual_partner() -> None:
    assert find("document", "short", target="short") == Format("document", Columns("document", None, "short"))
    assert find("report", "summary", prompt="report") == Format("document", Columns("report", None, "summary"))
    assert find("instruction", "input", "gold", target="gold") == Format(
        "alpaca", Columns("instruction", "input", "gold")
    )


def test_usual_names_that_are_named_keep_their_format() -> None:
    assert find("document", "summary", "text", prompt="document", target="summary").name == "document"
    assert find("instruction", "input", "output", prompt="input", target="output") == Format(
        "prompt", Columns("input", None, "output")
    )


@pytest.mark.parametrize("target", ["reply", "response", "output", "summary"])
def test_two_named_columns_stand_as_they_are_whatever_their_names(target: str) -> None:
    names = ("query", "context", "input", target)
    assert find(*names, prompt="query", target=target) == Format("prompt", Columns("query", None, target))
    told = find(*names, format="alpaca", prompt="query", target=target)
    assert told == Format("alpaca", Columns("query", "input", target))


def test_the_format_may_be_set_and_its_columns_named() -> None:
    assert find("a", "b", format="document", prompt="a", target="b") == Format("document", Columns("a", None, "b"))
    assert find("talk", format="sharegpt", messages="talk") == Format("sharegpt", Columns("talk", None, None))
    assert find("text", "messages", format="text").columns.text == "text"


def test_a_missing_column_is_named_with_the_nearest() -> None:
    told = error(DataError, "prompt", "completion", prompt="promt")
    assert told == (
        "train.jsonl has no column 'promt', which data.prompt names; did you mean 'prompt'? choices: completion, prompt"
    )
    assert "data.prompt and data.target both name column 'a'" in error(DataError, "a", prompt="a", target="a")


def test_where_nothing_is_found_the_settings_are_named() -> None:
    assert error(DataError, "a", "b") == (
        "train.jsonl has no known row format; set data.prompt and data.target, data.messages, or data.text; "
        "columns: a, b"
    )
    assert error(DataError, "a", "b", prompt="a") == (
        "train.jsonl has no usual target beside 'a'; name it in data.target; columns: a, b"
    )
    assert error(DataError, "a", "b", target="b") == (
        "train.jsonl has no usual prompt beside 'b'; name it in data.prompt; columns: a, b"
    )
    assert error(DataError, "a", format="alpaca") == (
        "train.jsonl has no instruction+output or instruction+response for data.format alpaca; "
        "name them: data.prompt and data.target; columns: a"
    )
    assert "name them: data.messages" in error(DataError, "a", format="messages")


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert error(SettingsError, "a", "b", "c", messages="a", target="b") == (
        "data.messages and data.target are set, and data.messages alone holds prompt and target"
    )
    assert error(SettingsError, "a", format="text", messages="a") == (
        "data.messages does not go with data.format text; set data.text"
    )
    assert error(SettingsError, "a", format="alpaca", text="a") == (
        "data.text does not go with data.format alpaca; set data.prompt and data.target"
    )
    assert "unknown data.format 'alpacca'; did you mean 'alpaca'?" in error(SettingsError, "a", format="alpacca")
