"""Which format a file has, what a row of each format says, and the problem of a row that is not whole."""

import json
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from tables import names_of, rows_of
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.rows.chat import ANSWERS, FORMATS, Chat, Format, Manner, Message, find_format, format_of, pair_format
from tsqlora.rows.rows import USUAL_PAIR, USUAL_TEXT, Columns, Row

PLAIN, CHAT, SEQ2SEQ = (Manner(seq2seq=s, chat=c) for s, c in ((False, False), (False, True), (True, False)))
PROMPT = Manner(seq2seq=False, chat=True, targets=False)
USER, ANSWER, SYSTEM = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "ho"), ("system", "s"))
)
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}
HI_HO = {"messages": [USER, ANSWER]}


def of(rows: Any, **named: Any) -> Format:
    return format_of(names_of(rows), "train.jsonl", **named)


def read(row: dict[str, Any], manner: Manner = PLAIN, **named: Any) -> Chat:
    rows = rows_of(row)
    return of(rows, **named).read(rows[0], manner)


def chat(*texts: str, **about: Any) -> Chat:
    """User and assistant in turn; a text that begins with ! is the system's."""
    made = [Message("system", text[1:]) for text in texts if text.startswith("!")]
    others = [text for text in texts if not text.startswith("!")]
    return Chat((*made, *(Message(("user", "assistant")[k % 2], text) for k, text in enumerate(others))), **about)


def plain(prompt: str, *target: str) -> Chat:
    return chat(prompt, *target, plain=True)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


BELOW = "Below is an instruction that describes a task"
AS_ALPACA = (
    f"{BELOW}, paired with an input that provides further context. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    f"{BELOW}. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)
AT_ONCE = "Add.\n\n1 {2}"
ADD = {"instruction": "Add.", "input": "1 {2}", "output": "3"}
BRIEF = {"system": "Be brief.", "prompt": "Hi", "completion": "Ho"}
SQUAD = {
    "id": "5733be28",
    "title": "Notre_Dame",
    "context": "Bernadette saw her in Lourdes.",
    "question": "Where?",
    "answers": {"text": ["Lourdes", "in Lourdes"], "answer_start": [22, 19]},
}


@pytest.mark.parametrize(
    ("row", "manner", "says"),
    [
        (ADD, PLAIN, plain(AS_ALPACA, "3")),
        *((ADD | {"input": nothing}, PLAIN, plain(WITHOUT_INPUT, "3")) for nothing in ("", " ", None)),
        (ADD, CHAT, chat(AT_ONCE, "3")),
        (ADD, PROMPT, chat(AT_ONCE)),
        (ADD, SEQ2SEQ, plain(AT_ONCE, "3")),
        # The whole in one piece, as Alpaca has it, is no loss.
        (
            ADD | {"text": "### Instruction:\nAdd.\n### Input:\n1  {2}\n### Response:\n3"},
            CHAT,
            chat("Add.\n\n1 {2}", "3"),
        ),
        ({"prompt": "2 + 2 = ", "completion": "4\n"}, CHAT, plain("2 + 2 = ", "4\n")),
        ({"prompt": "p", "completion": "c", "response": "r"}, PROMPT, plain("p")),
        ({"context": "Sky.", "prompt": "Sky. Why?", "completion": "So"}, PLAIN, plain("Sky. Why?", "So")),
        (SQUAD, CHAT, plain("Bernadette saw her in Lourdes.\n\nWhere?", "Lourdes")),
        ({"document": "Long.", "summary": "L."}, PLAIN, plain("Long.\n\nTL;DR:", " L.")),
        ({"document": "Long.", "summary": "L."}, SEQ2SEQ, plain("Long.", "L.")),
        ({"text": "Once"}, PLAIN, Chat((Message("assistant", "Once"),), plain=True)),
        ({"text": "Once"}, PROMPT, plain("Once")),
        # A system prompt is the system's turn, or comes first; one format for a file, also where a row has none.
        (BRIEF, CHAT, chat("!Be brief.", "Hi", "Ho")),
        (BRIEF | {"system": ""}, CHAT, chat("Hi", "Ho")),
        (BRIEF, PLAIN, plain("Be brief.\n\nHi", "Ho")),
        (BRIEF, SEQ2SEQ, plain("Be brief.\n\nHi", "Ho")),
        ({"system_prompt": "Be brief.", "instruction": "Hi", "output": "Ho"}, CHAT, chat("!Be brief.", "Hi", "Ho")),
        ({"system_prompt": "s", "instruction": "Hi", "output": "Ho"}, SEQ2SEQ, plain("s\n\nHi", "Ho")),
        ({"system": "s", **HI_HO}, CHAT, chat("!s", "hi", "ho")),
        ({"system": "s", "messages": [SYSTEM, USER, ANSWER]}, CHAT, chat("!s", "hi", "ho")),
        # As a table holds chats: in JSON, or as Python writes them. Roles may be spelled in capitals.
        *(({"messages": write([USER, ANSWER])}, CHAT, chat("hi", "ho")) for write in (json.dumps, str)),
        ({"prompt": json.dumps([USER]), "completion": str([ANSWER])}, CHAT, replace(chat("hi", "ho"), context=1)),
        ({"messages": [USER | {"role": "User"}, ANSWER | {"role": "Assistant "}]}, CHAT, chat("hi", "ho")),
        ({"system": "s", "conversations": [HUMAN, GPT]}, CHAT, chat("!s", "hi", "ho")),
        # Intel/orca_dpo_pairs has system and question.
        ({"system": "s", "question": "Hi", "chosen": "Ho", "rejected": "No"}, PLAIN, plain("s\n\nHi", "Ho")),
        # A chat may be written in several ways; UltraChat's first message stands once more as the prompt.
        *(
            (row, PLAIN, chat("hi", "ho"))
            for row in (
                HI_HO,
                HI_HO | {"prompt": " hi\n"},
                {"messages": [USER | {"content": parts("h", "i")}, ANSWER | {"content": parts("ho")}]},
                {"conversations": [USER, ANSWER]},
                {"conversation": [HUMAN, GPT]},
                {"conversations": [USER | {"from": None, "value": None}, ANSWER | {"from": None, "value": None}]},
                {"messages": [HUMAN, GPT]},
                # What stands after the last answer is not trained on.
                {"messages": [USER, ANSWER, USER]},
                # A mark of the document is no text of it, and a weight of one changes nothing.
                HI_HO | {"documents": "doc3"},
                HI_HO | {"tools": None},
                {"messages": [USER, ANSWER | {"tool_calls": None}]},
                *({"messages": [USER, ANSWER | {"weight": none}]} for none in (None,)),
            )
        ),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, PLAIN, chat("!s", "hi", "ho")),
        # To write an answer is to leave out the one at the end.
        (HI_HO, PROMPT, chat("hi")),
        ({"messages": [USER]}, PROMPT, chat("hi")),
        ({"messages": [USER, ANSWER, USER]}, PROMPT, chat("hi", "ho", "hi")),
        # A prompt of messages has a completion of messages, or of text.
        *(
            ({"prompt": [USER | {"content": parts("hi")}], "completion": answer}, CHAT, chat("hi", "ho", context=1))
            for answer in ([ANSWER], [ANSWER | {"content": parts("h", "o")}], "ho")
        ),
    ],
)
def test_what_a_row_says(row: dict[str, Any], manner: Manner, says: Chat) -> None:
    assert read(row, manner) == says
    names, every = [*row], [message for message in says.messages if message.role != "system"]
    if manner is CHAT and "chosen" not in row and not says.plain:
        shown = format_of(names, "train.jsonl").show(Row(row, "train.jsonl", 1, 0)).messages
        assert [one for one in shown if one.role != "system"][: len(every)] == every


@pytest.mark.parametrize("weight", [0, 1, 1.0, "1", True, float("nan")])
def test_every_key_of_a_message_is_there_for_a_template(weight: Any) -> None:
    rows = {"messages": [USER | {"weight": weight}, ANSWER | {"weight": weight or 1}]}
    assert [message.whole for message in read(rows).messages] == rows["messages"]


@pytest.mark.parametrize(
    "row", [{"prompt": "a"}, {"instruction": "a", "input": ""}, {"document": "a"}, {"prompt": "a", "completion": None}]
)
def test_targets_may_be_missing_where_they_are_not_read(row: dict[str, Any]) -> None:
    (made,), names = rows_of(row), (*row, "completion", "output", "summary")
    result = find_format(names, source="train.jsonl").read(made, Manner(seq2seq=False, chat=False, targets=False))
    assert (result.plain, result.ends_answered) == (True, False)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "", "completion": "a"}, ["'prompt'"]),
        ({"prompt": 3, "completion": "a"}, ["holds 3", "'prompt'"]),
        ({"instruction": "a", "input": ["b"], "output": "c"}, ["holds ['b']", "'input'"]),
        ({"document": "a\ud800", "summary": "b"}, ["'document'", "surrogate"]),
        (SQUAD | {"answers": {"text": [], "answer_start": []}}, ["no text in column 'answers'"]),
        ({"messages": "hi"}, ["str 'hi'", "'messages'", '"role"', '"content"']),
        *(({"messages": text}, ["str ", "not a list of messages"]) for text in ("[{[]: 1}]", '[{"role": 1', "[{1}]")),
        ({"messages": []}, ["no messages", "'messages'"]),
        ({"messages": [USER, "ho"]}, ["message 2", "str 'ho'"]),
        ({"messages": [{"role": "user"}, ANSWER]}, ["message 1", "'content'"]),
        ({"messages": [{"from": "human"}]}, ["message 1", "'value'", "from and value"]),
        ({"messages": [{"role": "asistant", "content": "hi"}]}, ["message 1", "'asistant'", "mean 'assistant'"]),
        ({"messages": [{"role": 3, "content": "hi"}]}, ["message 1", "role, 3"]),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, ["message without text", "'messages'"]),
        ({"messages": [USER, {"role": "assistant", "content": ["x"]}]}, ["holds ['x']", "message 2"]),
        ({"messages": [USER]}, ["'messages'", "assistant"]),
        ({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}, ["message 2", "weight 0"]),
        ({"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]}, ["message 1", "'image'"]),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."}, ["column 'system'"]),
        ({"prompt": [USER], "completion": [USER]}, ["'completion'", "assistant"]),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, ["message 1", "from, 'bot'"]),
        ({"conversations": [{"text": "hi"}]}, ["message 1", "'role'"]),
        (HI_HO | {"tools": "no JSON"}, ["'tools'", "list"]),
        (HI_HO | {"functions": [{"name": "f"}]}, ["'functions'"]),
        (HI_HO | {"documents": [{"title": "f"}]}, ["'documents'"]),
        ({"history": [["a", "b"]], "instruction": "Hi.", "output": "Arr"}, ["column 'history' is not read"]),
        ({"tools": [{"name": "f"}], "instruction": "Hi.", "output": "Arr"}, ["column 'tools' is not read"]),
        ({"prompt": "p", "completion": "c", "response": "r"}, ["column 'response'"]),
        ({"prompt": "p", "completion": "c", "label": False}, ["'label' is false"]),
        ({"prompt": "p", "completion": "c", "text": "t"}, ["'text'", "data.prompt and data.target"]),
    ],
)
def test_a_row_that_is_not_whole_is_named_by_training_and_by_the_audit(row: dict[str, Any], names: list[str]) -> None:
    (made,) = rows_of(row)
    with pytest.raises(DataError) as caught:
        of([made]).read(made, PLAIN)
    assert str(caught.value).startswith("train.jsonl:7: ")
    assert all(name in str(caught.value) for name in names), caught.value
    one = of([made]).show(made)
    assert one.whole or str(caught.value) == f"train.jsonl:7: {one.problem}"


@pytest.mark.parametrize(
    ("row", "manner", "kind", "names"),
    [
        ({"messages": [ANSWER]}, PROMPT, DataError, ["train.jsonl:7: column 'messages'"]),
        (HI_HO, SEQ2SEQ, UnsupportedError, ["'messages'", "causal-lm", "data.prompt and data.target"]),
        ({"text": "Once"}, SEQ2SEQ, UnsupportedError, ["data.prompt and data.target"]),
    ],
)
def test_what_a_model_cannot_read_is_refused(
    row: dict[str, Any], manner: Manner, kind: type[TsqLoraError], names: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        read(row, manner)
    assert all(name in str(caught.value) for name in names), caught.value


def test_columns_that_settings_name_stand_alone() -> None:
    row = {"prompt": "p", "completion": "c", "passage": "b", "text": "t", "summary": "s"}
    assert read(row, prompt="text", target="completion") == plain("t", "c")
    assert read(row, text="text").answer == "t"


METADATA = {"id", "idx", "source", "url", "title", "category", "label", "labels", "class", "score"}
"""Columns that stay unread, unless a format has them as one of its pair (source and target)."""
CELLS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "m1"}, {"role": "assistant", "content": "m2"}],
    "conversations": [{"from": "human", "value": "c1"}, {"from": "gpt", "value": "c2"}],
    "conversation": [{"from": "human", "value": "c3"}, {"from": "gpt", "value": "c4"}],
    "history": [["h1", "h2"]],
    "tools": [{"name": "f"}],
    "documents": [{"text": "d1"}],
    "choices": ["A", "B"],
    "answers": {"text": ["squad"], "answer_start": [7]},
}
NAMES = sorted(
    {name for kind in FORMATS.values() for pair in kind.usual for name in (*pair, *kind.further) if name}
    | {"system", "system_prompt", "history", "tools", "choices", "options", "documents", "chosen", "rejected"}
    | {*METADATA, *USUAL_TEXT, *USUAL_PAIR.values()}
)
MANNERS = [replace(manner, targets=targets) for manner in (PLAIN, CHAT, SEQ2SEQ) for targets in (True, False)]


def texts_in(value: Any) -> set[str]:
    """The texts of a cell that a model could read."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return texts_in(value["text"]) if "text" in value else texts_in([*value.values()][-1])
    return set().union(*map(texts_in, value))


def require_said(row: dict[str, Any], manner: Manner, *, pairs: bool = False) -> None:
    """Every column is read, metadata, or named by the error."""
    rows, refusal = rows_of(row), ""
    try:
        format = (pair_format if pairs else find_format)(names_of(rows), source="train.jsonl")
        made = format.read(rows[0], manner)
    except TsqLoraError as error:
        refusal = str(error)
    if refusal:
        assert any(f"'{name}'" in refusal for name in row), refusal
        return
    seen = "\n".join([*(turn.content for turn in made.messages), *(tool["name"] for tool in made.tools)])
    unread = (METADATA | (set() if manner.targets else ANSWERS)) - {format.columns.text, format.columns.text_pair}
    for name in {*row} - unread - ({"rejected"} if pairs else set()):
        assert any(text in seen for text in texts_in(row[name])), f"{name} is dropped from {row}: {seen}"


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_every_usual_column_beside_every_usual_pair_is_read_or_refused_by_name(manner: Manner) -> None:
    pairs = {pair for kind in FORMATS.values() for pair in kind.usual}
    pairs |= {*combinations(NAMES, 2)} if manner == PLAIN else set()
    for pair in pairs:
        for further in NAMES:
            require_said({name: CELLS.get(name, f"<{name}>") for name in (*pair, further) if name}, manner)


def test_preference_rows_drop_nothing() -> None:
    for further in combinations(NAMES, 2):
        row = {name: CELLS.get(name, f"<{name}>") for name in ("chosen", "rejected", *further)}
        require_said(row, PLAIN, pairs=True)


def test_metadata_changes_nothing() -> None:
    row = {"prompt": "p", "completion": "c"}
    assert all(read(row | {name: "x"}) == read(row) for name in METADATA)


def find(names: str, **settings: Any) -> Format:
    return find_format(names.split(), source="train.jsonl", **settings)


@pytest.mark.parametrize(
    ("names", "settings", "format", "columns"),
    [
        ("instruction input output", {}, "alpaca", ("instruction", "input", "output")),
        ("instruction output", {}, "alpaca", ("instruction", None, "output")),
        ("instruction context response category", {}, "alpaca", ("instruction", "context", "response")),
        ("id question answer", {}, "prompt", ("question", None, "answer")),
        ("id conversations", {}, "sharegpt", ("conversations", None, None)),
        ("text label", {}, "text", ("text", None, None)),
        # The text beside a chat or an instruction is the same in one piece.
        ("text messages", {}, "messages", ("messages", None, None)),
        ("text instruction output", {}, "alpaca", ("instruction", None, "output")),
        ("text summary", {}, "document", ("text", None, "summary")),
        # Named columns win, whatever their names; one of them finds its usual partner.
        ("prompt completion q a", {"prompt": "q", "target": "a"}, "prompt", ("q", None, "a")),
        ("prompt completion q", {"text": "q"}, "text", ("q", None, None)),
        ("prompt completion chat", {"messages": "chat"}, "messages", ("chat", None, None)),
        ("messages conversation", {"messages": "conversation"}, "sharegpt", ("conversation", None, None)),
        ("document short", {"target": "short"}, "document", ("document", None, "short")),
        ("report summary", {"prompt": "report"}, "document", ("report", None, "summary")),
        ("instruction input gold", {"target": "gold"}, "alpaca", ("instruction", "input", "gold")),
        (
            "document summary text",
            {"prompt": "document", "target": "summary"},
            "document",
            ("document", None, "summary"),
        ),
        ("instruction input output", {"prompt": "input", "target": "output"}, "prompt", ("input", None, "output")),
        *(
            (f"query context input {name}", {"prompt": "query", "target": name}, "prompt", ("query", None, name))
            for name in ("reply", "output", "summary")
        ),
        ("query input y", {"format": "alpaca", "prompt": "query", "target": "y"}, "alpaca", ("query", "input", "y")),
        ("a b", {"format": "document", "prompt": "a", "target": "b"}, "document", ("a", None, "b")),
        ("talk", {"format": "sharegpt", "messages": "talk"}, "sharegpt", ("talk", None, None)),
        ("text messages", {"format": "text"}, "text", ("text", None, None)),
    ],
)
def test_the_format_follows_from_columns_and_settings(names: str, settings: Any, format: str, columns: Any) -> None:
    result = find(names, **settings)
    assert result == find(" ".join(reversed(names.split())), **settings) == Format(format, Columns(*columns))


@pytest.mark.parametrize("name", FORMATS)
def test_every_usual_pair_is_found_and_by_its_format(name: str) -> None:
    for prompt, target in FORMATS[name].usual:
        names = f"{prompt} {target or ''}"
        assert find(names) == find(names, format=name) == Format(name, Columns(prompt, None, target))


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
        find(names, **settings)
    assert all(name in str(caught.value) for name in message), caught.value
