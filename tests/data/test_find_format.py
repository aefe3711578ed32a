"""Which format a file has follows from its columns and the settings."""

from typing import Any

import pytest

from tsqlora.data.chat import FORMATS, Format, find_format
from tsqlora.data.rows import Columns
from tsqlora.errors import DataError, SettingsError, TsqLoraError


def find(*names: str, **settings: Any) -> Format:
    return find_format(names, source="train.jsonl", **settings)


@pytest.mark.parametrize(
    ("names", "format", "columns"),
    [
        (("instruction", "input", "output"), "alpaca", Columns("instruction", "input", "output")),
        (("instruction", "output"), "alpaca", Columns("instruction", None, "output")),
        (("instruction", "context", "response", "category"), "alpaca", Columns("instruction", "context", "response")),
        (("id", "question", "answer"), "prompt", Columns("question", None, "answer")),
        (("id", "conversations"), "sharegpt", Columns("conversations", None, None)),
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


@pytest.mark.parametrize("target", ["reply", "output", "summary"])
def test_two_named_columns_stand_as_they_are_whatever_their_names(target: str) -> None:
    names = ("query", "context", "input", target)
    assert find(*names, prompt="query", target=target) == Format("prompt", Columns("query", None, target))
    message = find(*names, format="alpaca", prompt="query", target=target)
    assert message == Format("alpaca", Columns("query", "input", target))


def test_the_format_may_be_set_and_its_columns_named() -> None:
    assert find("a", "b", format="document", prompt="a", target="b") == Format("document", Columns("a", None, "b"))
    assert find("talk", format="sharegpt", messages="talk") == Format("sharegpt", Columns("talk", None, None))
    assert find("text", "messages", format="text").columns.text == "text"


@pytest.mark.parametrize(
    ("kind", "names", "settings", "message"),
    [
        (DataError, "prompt completion", {"prompt": "promt"}, ["'promt'", "data.prompt", "mean 'prompt'"]),
        (DataError, "a", {"prompt": "a", "target": "a"}, ["data.prompt and data.target both name column 'a'"]),
        (DataError, "a b", {}, ["train.jsonl", "data.prompt", "data.target", "data.messages", "data.text", "'a', 'b'"]),
        (DataError, "a b", {"prompt": "a"}, ["'a'", "data.target", "'a', 'b'"]),
        (DataError, "a b", {"target": "b"}, ["'b'", "data.prompt", "'a', 'b'"]),
        (DataError, "a", {"format": "alpaca"}, ["data.format alpaca", "data.prompt"]),
        (SettingsError, "a b", {"messages": "a", "target": "b"}, ["data.messages and data.target"]),
        (SettingsError, "a", {"format": "text", "messages": "a"}, ["data.messages", "data.format text", "data.text"]),
        (SettingsError, "a", {"format": "alpaca", "text": "a"}, ["data.text", "data.prompt and data.target"]),
        (SettingsError, "a", {"format": "alpacca"}, ["'alpacca'", "mean 'alpaca'"]),
    ],
)
def test_what_cannot_be_is_refused_by_its_settings(
    kind: type[TsqLoraError], names: str, settings: dict[str, Any], message: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        find(*names.split(), **settings)
    assert all(name in str(caught.value) for name in message), caught.value
