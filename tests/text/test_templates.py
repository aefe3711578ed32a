"""Right chats of well-known models have no finding; each planted fault has its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from families import FAMILIES, Family, tokenizer_of
from tsqlora.data.chat import format_of
from tsqlora.data.rows import Row
from tsqlora.text.findings import findings_of
from tsqlora.text.ledger import Line
from tsqlora.text.raw import audited
from tsqlora.text.vocabulary import Vocabulary, vocabulary_of

QUESTION, ANSWER = "What is the capital of France, please?", "It is Paris, on the river Seine."
LIMIT = 2_000


def turns(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    chat = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *chat]}


def vocabulary(family: Family) -> Vocabulary:
    tokenizer = tokenizer_of(family)
    return vocabulary_of(tokenizer, generation_ends=tokenizer.convert_tokens_to_ids(list(family.stops)))


def lines(rows: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, limit: int = LIMIT) -> list[Line]:
    format = format_of(list(rows[0]), "rows.jsonl")
    made = [Row(dict(cells), "rows.jsonl", j + 1, j) for j, cells in enumerate(rows)]
    return audited(made, format, vocabulary, limit)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_chats_have_no_finding(name: str) -> None:
    family = FAMILIES[name]
    rows = [
        turns(QUESTION, ANSWER),
        turns(QUESTION, f" {ANSWER}\n"),
        turns(QUESTION, "Ünï 漢字 🙂, with a list:\n- a\n- b"),
    ]
    if "thinking" not in name:  # it rewrites earlier answers, so that a conversation is one answer
        rows.append(turns(QUESTION, ANSWER, "And of Spain?", "Madrid."))
    rows += [turns(QUESTION, ANSWER, system="Be brief.")] if family.system else []
    for line in lines(rows, vocabulary(family)):
        assert (line.findings, line.fate, line.stop_trained) == ([], "trained", True), (name, line)


def test_right_tool_calls_have_no_finding() -> None:
    tool = {"type": "function", "function": {"name": "capital", "parameters": {"country": {"type": "string"}}}}
    call = {"type": "function", "function": {"name": "capital", "arguments": {"country": "France"}}}
    chat = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Paris"},
        {"role": "assistant", "content": ANSWER},
    ]
    (line,) = lines([{"messages": chat, "tools": [tool]}], vocabulary(FAMILIES["qwen 2.5, tools"]))
    assert (line.findings, line.fate, line.stop_trained) == ([], "trained", True), line
    (line,) = lines([{"messages": chat[:2] + chat[3:], "tools": [tool]}], vocabulary(FAMILIES["qwen 2.5, tools"]))
    assert line.findings == ["roles"]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_does_not_fit_is_cut_or_left_out(name: str) -> None:
    (line,) = lines([turns(QUESTION, ANSWER * 20)], vocabulary(FAMILIES[name]), limit=200)
    assert line.findings == ["answer_cut"]
    assert line.lost_tokens


def test_a_template_that_rewrites_earlier_answers_trains_the_last_one_alone() -> None:
    reasoning = "<think>\nFrance.\n</think>\n\n"
    family = vocabulary(FAMILIES["qwen 3, thinking"])
    plain, thinks, fits = lines(
        [turns(QUESTION, a, "And of Spain?", b) for a, b in ((ANSWER, "Madrid."), (reasoning + ANSWER, "Madrid."))]
        + [turns(QUESTION, ANSWER)],
        family,
    )
    assert plain.findings == ["prompt_not_prefix"]
    assert thinks.findings == ["prompt_not_prefix", "reasoning_stripped"]
    assert {(line.fate, line.stop_trained) for line in (plain, thinks, fits)} == {("trained", True)}
    assert fits.findings == []


def test_completions_of_a_base_model_have_no_finding() -> None:
    family = FAMILIES["zephyr"]
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = None
    vocabulary = vocabulary_of(tokenizer)
    for line in lines([{"prompt": f"{QUESTION} ", "completion": ANSWER}], vocabulary):
        assert (line.findings, line.stop_trained) == ([], True)
    assert not vocabulary.stops - {tokenizer.eos_token_id}


def test_a_template_that_writes_no_stop_is_named() -> None:
    family = FAMILIES["qwen 2.5"]
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (line,) = lines([turns(QUESTION, ANSWER)], vocabulary_of(tokenizer))
    assert line.findings == ["stop_not_trained"]
    assert [finding.severity for finding in findings_of([line])] == ["error"]
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"  # as GLM
    (line,) = lines([turns(QUESTION, ANSWER, QUESTION, ANSWER)], vocabulary_of(tokenizer))
    assert line.findings == ["stop_not_trained"]
    assert [finding.severity for finding in findings_of([line])] == ["warning"]


def test_an_error_of_all_rows_is_one_of_all_that_the_template_takes() -> None:
    bad, gone, fine = (Line(row, "", fate=fate) for row, fate in enumerate(("trained", "dropped", "trained")))
    bad.find("nothing_trained")
    gone.find("template_error")
    assert {finding.name: finding.severity for finding in findings_of([bad, gone])}["nothing_trained"] == "error"
    assert {finding.name: finding.severity for finding in findings_of([bad, gone, fine])}["nothing_trained"] != "error"


def test_a_stop_at_which_generation_does_not_stop() -> None:
    family = FAMILIES["qwen 2.5"]
    tokenizer = tokenizer_of(family)
    vocabulary = vocabulary_of(tokenizer, generation_ends=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    (line,) = lines([turns(QUESTION, ANSWER)], vocabulary)
    assert line.findings == ["stop_mismatch"]


def test_a_doubled_bos_is_found() -> None:
    family = FAMILIES["llama 3"]
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = "{{ bos_token }}" + family.template
    (line,) = lines([turns(QUESTION, ANSWER)], vocabulary_of(tokenizer))
    assert "bos" in line.findings


def test_a_template_that_refuses_a_role_names_the_rows() -> None:
    first, second = lines(
        [turns(QUESTION, ANSWER, system="Be brief."), turns(QUESTION, ANSWER)], vocabulary(FAMILIES["gemma 2"])
    )
    assert (first.findings, first.fate) == (["template_error"], "dropped")
    assert "System role not supported" in first.detail
    assert second.findings == []


def test_half_a_character_drops_its_row_alone() -> None:
    call = {"type": "function", "function": {"name": "capital", "arguments": {"country": "\ud83d"}}}
    called = turns(QUESTION, ANSWER)
    called["messages"][1]["tool_calls"] = [call]
    rows = [turns(QUESTION, ANSWER), turns(QUESTION, f"{ANSWER} \ud83d"), called]
    whole, *halves = lines(rows, vocabulary(FAMILIES["qwen 2.5, tools"]))
    assert (whole.fate, whole.findings) == ("trained", [])
    assert {line.fate for line in halves} == {"dropped"}
    assert all("surrogate" in line.detail for line in halves)
