"""What a row of each format says, and what is result of one that does not."""

from typing import Any

import pytest

from tables import rows_of
from tsqlora.data.chat import Chat, Example, Manner, Message, conversation, find_format
from tsqlora.errors import DataError, TsqLoraError, UnsupportedError

CAUSAL, SEQ2SEQ = Manner(seq2seq=False, chat=False), Manner(seq2seq=True, chat=False)
CHAT, PROMPT = Manner(seq2seq=False, chat=True), Manner(seq2seq=False, chat=True, targets=False)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def read(row: dict[str, Any], manner: Manner = CAUSAL) -> Example | Chat:
    (row,) = rows_of(row)
    return find_format([*row.cells], source="train.jsonl").read(row, manner)


def error(row: dict[str, Any], manner: Manner = CAUSAL, kind: type[TsqLoraError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read(row, manner)
    return str(caught.value)


def test_alpaca_has_a_prompt_with_and_one_without_an_input() -> None:
    result = read({"instruction": "Add.", "input": "1 {2}", "output": "3"})
    assert isinstance(result, Example)
    assert result.target == "3"
    assert result.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert result.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n")
    for nothing in ("", " ", None):
        alone = read({"instruction": "Rhyme.", "input": nothing, "output": "3"})
        assert isinstance(alone, Example)
        assert "### Input" not in alone.prompt
        assert alone.prompt.endswith(
            "appropriately completes the request.\n\n### Instruction:\nRhyme.\n\n### Response:\n"
        )


def test_alpaca_is_a_chat_where_the_tokenizer_has_a_template() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read(row, CHAT) == Chat((Message("user", "Add.\n\n1 2"), Message("assistant", "3")))
    assert read(row, PROMPT) == Chat((Message("user", "Add.\n\n1 2"),))
    assert read(row, SEQ2SEQ) == Example("Add.\n\n1 2", "3")


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"history": [["a", "b"]], "instruction": "Hi.", "output": "Arr"}, "history"),
        ({"tools": [{"name": "f"}], "instruction": "Hi.", "output": "Arr"}, "tools"),
        ({"history": [["a", "b"]], "prompt": "Hi.", "completion": "Arr"}, "history"),
    ],
)
def test_columns_of_other_trainers_are_refused_unless_empty(row: dict[str, Any], column: str) -> None:
    assert f"train.jsonl:7: column '{column}' is not read" in error(row)
    assert read(row | {column: ""}) == read({name: value for name, value in row.items() if name != column})


def test_prompt_and_completion_stand_as_they_are() -> None:
    assert read({"prompt": "2 + 2 = ", "completion": "4\n"}) == Example("2 + 2 = ", "4\n")


def test_a_document_is_prompt_for_its_summary() -> None:
    row = {"document": "Long.", "summary": "L."}
    assert read(row) == Example("Long.\n\nTL;DR:", " L.")
    assert read(row, SEQ2SEQ) == Example("Long.", "L.")


def test_plain_text_is_all_target_or_all_prompt() -> None:
    assert read({"text": "Once"}) == Example("", "Once")
    assert read({"text": "Once"}, PROMPT) == Example("Once", None)
    assert "data.prompt and data.target" in error({"text": "Once"}, SEQ2SEQ, UnsupportedError)


@pytest.mark.parametrize(
    "row", [{"prompt": "a"}, {"instruction": "a", "input": ""}, {"document": "a"}, {"prompt": "a", "completion": None}]
)
def test_targets_are_not_prompt_for_where_they_are_not_read(row: dict[str, Any]) -> None:
    (made,) = rows_of(row)
    names = (*row, "completion", "output", "summary")
    turns = find_format(names, source="train.jsonl").read(made, Manner(seq2seq=False, chat=False, targets=False))
    assert isinstance(turns, Example)
    assert turns.target is None


def test_messages_are_turns() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert read({"messages": [system, USER, ANSWER]}) == Chat(
        (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "ho"))
    )


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert read({"messages": [USER | {"content": parts}, ANSWER]}) == read({"messages": [USER, ANSWER]})


def test_what_stands_after_the_last_answer_is_not_trained_on() -> None:
    assert read({"messages": [USER, ANSWER, USER]}) == read({"messages": [USER, ANSWER]})


def test_to_write_an_answer_is_to_leave_out_the_one_at_the_end() -> None:
    prompt = Chat((Message("user", "hi"),))
    assert read({"messages": [USER, ANSWER]}, PROMPT) == read({"messages": [USER]}, PROMPT) == prompt
    assert read({"messages": [USER, ANSWER, USER]}, PROMPT) == Chat(
        (*prompt.messages, Message("assistant", "ho"), *prompt.messages)
    )


def test_sharegpt_has_other_names_for_the_same() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert read({"conversations": turns}) == Chat(
        (Message("system", "s"), Message("user", "hi"), Message("assistant", "ho"))
    )


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER | {"content": parts("h", "i")}, ANSWER | {"content": parts("ho")}]},
        {"conversations": [USER, ANSWER]},
        {"conversation": [USER, ANSWER]},
        {"conversations": [USER | {"from": None, "value": None}, ANSWER | {"from": None, "value": None}]},
        {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    ],
)
def test_chats_may_be_written_in_several_ways(row: dict[str, Any]) -> None:
    chat = Chat((Message("user", "hi"), Message("assistant", "ho")))
    assert read(row) == chat
    format = find_format(list(row), source="train.jsonl")
    assert [(m.role, m.content) for m in conversation(row, format, 0).messages] == [("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize("answer", [[ANSWER], [ANSWER | {"content": parts("h", "o")}], "ho"])
def test_a_prompt_of_messages_has_a_completion_of_messages_or_text(answer: Any) -> None:
    row = {"prompt": [USER | {"content": parts("hi")}], "completion": answer}
    assert read(row) == Chat((Message("user", "hi"), Message("assistant", "ho")), context=1)
    format = find_format(list(row), source="train.jsonl")
    assert [(m.role, m.content) for m in conversation(row, format, 0).messages] == [("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "", "completion": "a"}, ["'prompt'"]),
        ({"prompt": 3, "completion": "a"}, ["int 3", "'prompt'"]),
        ({"instruction": "a", "input": ["b"], "output": "c"}, ["list ['b']", "'input'"]),
        ({"document": "a\ud800", "summary": "b"}, ["'document'", "surrogate"]),
        ({"messages": "hi"}, ["str 'hi'", "'messages'", '"role"', '"content"']),
        ({"messages": []}, ["no messages", "'messages'"]),
        ({"messages": [USER, "ho"]}, ["message 2", "str 'ho'"]),
        ({"messages": [{"role": "user"}, ANSWER]}, ["message 1", "'content'"]),
        ({"messages": [{"from": "human"}]}, ["message 1", "'value'", "from and value"]),
        ({"messages": [{"role": "asistant", "content": "hi"}]}, ["message 1", "'asistant'", "mean 'assistant'"]),
        ({"messages": [{"role": 3, "content": "hi"}]}, ["message 1", "role, 3"]),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, ["message without text", "'messages'"]),
        ({"messages": [USER, {"role": "assistant", "content": ["x"]}]}, ["list ['x']", "message 2"]),
        ({"messages": [USER]}, ["'messages'", "assistant"]),
        ({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}, ["message 2", "weight 0"]),
        ({"messages": [USER, ANSWER], "tools": "no JSON"}, ["'tools'", "list"]),
        ({"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]}, ["message 1", "'image'"]),
        ({"prompt": [USER], "completion": [USER]}, ["'completion'", "assistant"]),
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, ["'functions'"]),
        ({"messages": [USER, ANSWER], "documents": [{"title": "f"}]}, ["'documents'"]),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, ["message 1", "from, 'bot'"]),
        ({"conversations": [{"text": "hi"}]}, ["message 1", "'role'"]),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], names: list[str]) -> None:
    result = error(row)
    assert result.startswith("train.jsonl:7: ")
    assert all(name in result for name in names), result


def test_a_key_that_is_empty_is_as_good_as_none() -> None:
    row = {"messages": [USER, ANSWER]}
    assert read({"messages": [USER, ANSWER | {"tool_calls": None}], "tools": None}) == read(row)
    weighted = read({"messages": [USER | {"weight": 0}, ANSWER | {"weight": 1}]})
    assert isinstance(weighted, Chat)
    assert [message.whole for message in weighted.messages] == [USER | {"weight": 0}, ANSWER | {"weight": 1}]


def test_a_chat_with_nothing_to_answer_is_named() -> None:
    assert "train.jsonl:7: column 'messages'" in error({"messages": [ANSWER]}, PROMPT)


def test_chats_are_for_causal_models() -> None:
    result = error({"messages": [USER, ANSWER]}, SEQ2SEQ, UnsupportedError)
    assert all(name in result for name in ("'messages'", "causal-lm", "data.prompt and data.target"))


def test_documents_that_are_no_list_and_weights_of_one_are_read() -> None:
    answers = [ANSWER | {"weight": weight} for weight in (1, 1.0, "1", True, None, float("nan"))]
    for answer in answers:
        assert read({"messages": [USER, answer], "documents": "doc3"})
