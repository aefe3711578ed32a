"""No column that a person would call part of a row is dropped without a word."""

from itertools import combinations
from typing import Any

import pytest

from tables import names_of, rows_of
from tsqlora.data.chat import ANSWERS, FORMATS, Chat, Example, Manner, Message, find_format, pair_format
from tsqlora.data.rows import USUAL_PAIR, USUAL_TEXT
from tsqlora.errors import DataError, TsqLoraError

METADATA = {"id", "idx", "source", "url", "title", "category", "label", "labels", "class", "score"}
"""Columns that stay unread, unless a format has them as one of its pair (source and target)."""
CHATS = {
    "messages": [{"role": "user", "content": "m1"}, {"role": "assistant", "content": "m2"}],
    "conversations": [{"from": "human", "value": "c1"}, {"from": "gpt", "value": "c2"}],
    "conversation": [{"from": "human", "value": "c3"}, {"from": "gpt", "value": "c4"}],
}
CELLS: dict[str, Any] = CHATS | {
    "history": [["h1", "h2"]],
    "tools": [{"name": "f"}],
    "documents": [{"text": "d1"}],
    "choices": ["A", "B"],
    "answers": {"text": ["squad"], "answer_start": [7]},
}
PARTS = (
    {"context", "passage", "system", "system_prompt", "history", "tools", "choices", "options", "documents"}
    | {"prompt", "input", "instruction", "question", "text", "document", "messages", "conversations"}
    | {"completion", "response", "output", "answer", "answers", "target", "summary", "chosen", "rejected"}
)
NAMES = sorted(
    {name for kind in FORMATS.values() for pair in kind.usual for name in (*pair, *kind.further) if name}
    | {*PARTS, *METADATA, *USUAL_TEXT, *USUAL_PAIR.values()}
)
MANNERS = [
    Manner(seq2seq=s, chat=c, targets=t)
    for s, c in ((False, False), (False, True), (True, False))
    for t in (True, False)
]


def cell(name: str) -> Any:
    return CELLS.get(name, f"<{name}>")


def texts_in(value: Any) -> set[str]:
    """The texts of a cell that a model could read."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return texts_in(value["text"]) if "text" in value else texts_in([*value.values()][-1])
    return set().union(*map(texts_in, value))


def encoded(example: Example | Chat) -> str:
    if isinstance(example, Chat):
        return "\n".join([*(turn.content for turn in example.messages), *(tool["name"] for tool in example.tools)])
    return f"{example.prompt}\n{example.target}"


def require_said(row: dict[str, Any], manner: Manner, *, pairs: bool = False) -> None:
    """Every column is read, metadata, or named by the error."""
    rows, refusal = rows_of(row), ""
    try:
        format = (pair_format if pairs else find_format)(names_of(rows), source="train.jsonl")
        seen = encoded(format.read(rows[0], manner))
    except TsqLoraError as error:
        refusal = str(error)
    if refusal:
        assert any(f"'{name}'" in refusal for name in row), refusal
        return
    unread = (METADATA | (set() if manner.targets else ANSWERS)) - {format.columns.text, format.columns.text_pair}
    for name in {*row} - unread - ({"rejected"} if pairs else set()):
        assert any(text in seen for text in texts_in(row[name])), f"{name} is dropped from {row}: {seen}"


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_every_usual_column_beside_every_usual_pair_is_read_or_refused_by_name(manner: Manner) -> None:
    pairs = {pair for kind in FORMATS.values() for pair in kind.usual} | {*combinations(NAMES, 2)}
    for pair in pairs:
        for further in NAMES:
            require_said({name: cell(name) for name in (*pair, further) if name}, manner)


def test_preference_rows_drop_nothing() -> None:
    for further in combinations(NAMES, 2):
        require_said({name: cell(name) for name in ("chosen", "rejected", *further)}, MANNERS[0], pairs=True)


def test_metadata_changes_nothing() -> None:
    row = {"prompt": "p", "completion": "c"}
    for name in METADATA:
        assert read(row | {name: "x"}) == read(row)


def read(row: dict[str, Any], manner: Manner = MANNERS[0], **named: Any) -> Example | Chat:
    rows = rows_of(row)
    return find_format(names_of(rows), source="train.jsonl", **named).read(rows[0], manner)


SQUAD = {
    "id": "5733be28",
    "title": "Notre_Dame",
    "context": "Bernadette saw her in Lourdes.",
    "question": "Where?",
    "answers": {"text": ["Lourdes", "in Lourdes"], "answer_start": [22, 19]},
}


def test_squad_is_read_as_it_is_published() -> None:
    assert read(SQUAD) == Example("Bernadette saw her in Lourdes.\n\nWhere?", "Lourdes")
    with pytest.raises(DataError, match=r"train\.jsonl:7: no text in column 'answers'"):
        read(SQUAD | {"answers": {"text": [], "answer_start": []}})


def test_a_context_that_the_prompt_has_already_is_read_once() -> None:
    assert read({"context": "Sky.", "prompt": "Sky. Why?", "completion": "So"}) == Example("Sky. Why?", "So")


def test_a_system_prompt_is_the_system_turn_or_comes_first() -> None:
    chat, plain, seq2seq = MANNERS[2], MANNERS[0], MANNERS[4]
    system, user, answer = Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho")
    turns = Chat((system, user, answer))
    rows = [
        {"system": "Be brief.", "prompt": "Hi", "completion": "Ho"},
        {"system_prompt": "Be brief.", "instruction": "Hi", "output": "Ho"},
        {
            "system": "Be brief.",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        },
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    ]
    assert all(read(row, chat) == turns for row in rows)
    assert read(rows[0], plain) == read(rows[0], seq2seq) == Example("Be brief.\n\nHi", "Ho")
    assert read(rows[1], seq2seq) == Example("Be brief.\n\nHi", "Ho")
    # One format for a file, also where single rows have no system prompt.
    assert read({**rows[0], "system": ""}, chat) == Chat((user, answer))


def test_a_chat_has_one_system_turn() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *CHATS["messages"]]
    assert read({"messages": turns, "system": "Be brief."}) == read({"messages": turns})
    with pytest.raises(DataError, match=r"train\.jsonl:7: column 'system'"):
        read({"messages": turns, "system": "Be long."})


def test_what_the_row_says_once_more_is_no_loss() -> None:
    """The first message as `prompt` (UltraChat), and the whole in one piece as `text` (Alpaca)."""
    chat = {"messages": CHATS["messages"]}
    assert read(chat | {"prompt": " m1\n"}) == read(chat)
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read(row | {"text": "### Instruction:\nAdd.\n### Input:\n1  2\n### Response:\n3"}) == read(row)


def test_columns_that_settings_name_stand_alone() -> None:
    row = {"prompt": "p", "completion": "c", "passage": "b", "text": "t", "summary": "s"}
    with pytest.raises(DataError, match=r"'text'.*data\.prompt and data\.target"):
        read(row)
    assert read(row, prompt="text", target="completion") == Example("t", "c")
    assert read(row, text="text") == Example("", "t")


def test_answers_do_not_matter_where_none_is_read() -> None:
    assert read({"prompt": "p", "completion": "c", "response": "r"}, MANNERS[1]) == Example("p", None)
    with pytest.raises(DataError, match="column 'response'"):
        read({"prompt": "p", "completion": "c", "response": "r"})


def test_preference_rows_have_their_prompt_under_its_usual_names() -> None:
    """Intel/orca_dpo_pairs has system and question."""
    rows = rows_of({"system": "Be brief.", "question": "Hi", "chosen": "Ho", "rejected": "No"})
    format = pair_format(names_of(rows), source="train.jsonl")
    assert format.read(rows[0], MANNERS[0]) == Example("Be brief.\n\nHi", "Ho")
