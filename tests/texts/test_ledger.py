"""One row against the tokens and labels that were made of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from byte_tokenizers import byte_tokenizer
from tsqlora.auditing.texts.ledger import content_findings, line_of, locate
from tsqlora.auditing.texts.prepared import Trained, sequences_of
from tsqlora.auditing.texts.raw import audited
from tsqlora.auditing.texts.vocabulary import Vocabulary, vocabulary_of
from tsqlora.errors import DataError
from tsqlora.rows.chat import Chat, Message, format_of
from tsqlora.rows.rows import Row
from tsqlora.tasks.generation import IGNORED

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION, ANSWER = "What is the capital of France, please?", "It is Paris, on the river Seine."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer(opens=False, closes=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return vocabulary_of(tokenizer)


def chat(*contents: str, row: int = 0) -> Chat:
    roles = ("user", "assistant") * len(contents)
    return Chat(tuple(map(Message, roles, contents)), row=row)


def trained(tokenizer: Any, conversation: Chat, *, keep: slice = slice(None), stop: bool = True) -> Trained:
    """The conversation as a chat, with loss on answers, and on the end token behind them if `stop`."""
    ids, targets = [], []
    for message in conversation.messages:
        answer = message.role == "assistant"
        for text, loss in (
            (f"<|im_start|>{message.role}\n", False),
            (message.content.strip(), answer),
            ("<|im_end|>", answer and stop),
            ("\n", False),
        ):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += own
            targets += own if loss else [IGNORED] * len(own)
    return Trained(np.array(ids)[keep], np.array(targets)[keep], conversation.row)


@pytest.mark.parametrize(
    ("contents", "findings"),
    [
        ((QUESTION, ANSWER), []),
        ((QUESTION, ANSWER, "And of Spain?", f"  {ANSWER} ü 漢\n"), []),
        ((QUESTION, "Write `<b>` for bold, and <3 for a heart: a < b > c.\n```html\n<p>Paris</p>\n```"), []),
        ((QUESTION, " "), ["empty_answer"]),
        ((QUESTION, f"{QUESTION} {ANSWER}"), ["copies_prompt"]),
        ((f"{QUESTION}\n\nTL;DR:", f"{QUESTION} {ANSWER}"), ["copies_prompt"]),
        ((QUESTION, f"{ANSWER}<|im_end|>"), ["template_twice"]),
        ((QUESTION, f"{ANSWER}\n### Instruction: more"), ["broken_characters"]),
        ((QUESTION, "It is a cafÃ© in Paris"), ["broken_characters"]),
        ((QUESTION, f"<p>{ANSWER}</p>"), ["html"]),
        ((QUESTION,), ["roles", "nothing_trained"]),
    ],
)
def test_contents_show_it(contents: Sequence[str], findings: list[str], tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(*contents)
    line = line_of(row, [trained(tokenizer, row)], vocabulary)
    assert line.findings == findings
    answers = [message.content.strip().encode() for message in row.messages if message.role == "assistant"]
    if not findings:
        assert (line.fate, line.stop_trained, line.lost_tokens) == ("trained", True, 0)
        size = sum(map(len, answers))
        assert (line.answer_tokens, line.trained_tokens) == (size, size + len(answers))


THOUGHT, CALL = "<think>\nFrance is in Europe.\n</think>\n\n", {"function": {"name": "capital", "arguments": {}}}
SPAIN = ("And of Spain, which is in Europe?", f"{THOUGHT}Madrid.")


@pytest.mark.parametrize(
    ("source", "written", "findings"),
    [
        ((QUESTION, ANSWER, *SPAIN), (QUESTION, ANSWER, "x", SPAIN[1]), ["content_lost"]),
        ((QUESTION, f"{THOUGHT.strip()}{ANSWER}"), (QUESTION, f"{THOUGHT}{ANSWER}"), []),
        ((QUESTION, f"<think>\n\n</think>\n{ANSWER}"), (QUESTION, ANSWER), []),
        ((f"Do.\n\n{QUESTION}", ANSWER), (f"Do.\n\n### Input:\n{QUESTION}", ANSWER), []),
        ((f"Do this.\n\n{QUESTION}", ANSWER), (f"### Input:\n{QUESTION}", ANSWER), ["content_lost"]),
        ((QUESTION, THOUGHT + ANSWER, *SPAIN), (QUESTION, ANSWER, *SPAIN), ["reasoning_stripped"]),
        ((QUESTION, THOUGHT + ANSWER, *SPAIN), (QUESTION, "no", *SPAIN), ["content_lost", "answer_cut"]),
        ((QUESTION, ANSWER, *SPAIN), (QUESTION, ANSWER, SPAIN[0], "Madrid."), ["content_lost"]),
    ],
)
def test_a_template_may_write_contents_in_another_way(
    source: Sequence[str], written: Sequence[str], findings: list[str], tokenizer: Any, vocabulary: Vocabulary
) -> None:
    line = line_of(chat(*source), [trained(tokenizer, chat(*written))], vocabulary, limit=1000)
    assert (line.findings, line.stop_trained) == (findings, True)


@pytest.mark.parametrize("kind", ["chat", "reasoning", "call"])
def test_what_the_limit_cuts_is_no_lost_content(kind: str, tokenizer: Any, vocabulary: Vocabulary) -> None:
    ask, call = Message("user", f"Use capital. {QUESTION}"), Message("assistant", "", {"tool_calls": [CALL]})
    tools = Chat((ask, call, Message("tool", "Paris"), Message("assistant", f"The capital: {ANSWER}")))
    row = {"chat": chat(QUESTION, ANSWER), "reasoning": chat(QUESTION, ANSWER, *SPAIN), "call": tools}[kind]
    keep = {"chat": slice(0, -12), "reasoning": slice(-30, None), "call": slice(0, 80)}[kind]
    one = trained(tokenizer, row, keep=keep)
    line = line_of(row, [one], vocabulary, limit=len(one.ids))
    assert (line.findings, line.fate) == (["answer_cut"], "cut")
    if kind == "call":
        written = replace(row, messages=(ask, Message("assistant", "{'name': 'capital'}"), *row.messages[2:]))
        for other, findings in ((row, ["content_lost"]), (written, [])):
            assert line_of(row, [trained(tokenizer, other)], vocabulary).findings == findings


def test_a_cut_answer_is_counted_and_a_stop_behind_it_is_an_error(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row, whole = chat(QUESTION, ANSWER), trained(tokenizer, chat(QUESTION, ANSWER))
    cut = line_of(row, [trained(tokenizer, row, keep=slice(0, -12))], vocabulary)
    assert (cut.lost_tokens, cut.stop_trained) == (10, None)
    ids, targets = (np.r_[one[:-12], one[-2]] for one in (whole.ids, whole.targets))
    assert "cut_then_stop" in line_of(row, [Trained(ids, targets, 0)], vocabulary).findings


def test_what_the_mask_leaves_out_or_takes_in(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(QUESTION, ANSWER, QUESTION, ANSWER)
    one, unstopped = trained(tokenizer, row), trained(tokenizer, row, stop=False)
    last, moved = one.targets.copy(), unstopped.targets.copy()
    last[: len(one.ids) // 2] = IGNORED
    # LLaMA-Factory's efficient_eos puts the stop on the first token of the next turn.
    moved[len(one.ids) - 2] = next(iter(vocabulary.stops))
    for targets, findings, fate in (
        (np.full(len(one.ids), IGNORED), ["nothing_trained"], "nothing to train"),
        (one.ids, ["prompt_trained"], "trained"),
        (last, ["only_last_answer"], "trained"),
        (moved, [], "trained"),
    ):
        line = line_of(row, [Trained(one.ids, targets, 0)], vocabulary)
        assert (line.findings, line.fate) == (findings, fate)


def test_a_prompt_that_lacks_its_end_before_an_answer_is_lost(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row, text = chat(QUESTION, ANSWER), QUESTION.encode()
    whole = trained(tokenizer, row)
    last = np.searchsorted(vocabulary.ends(whole.ids), vocabulary.text(whole.ids).index(text) + len(text))
    ids, targets = (np.delete(one, slice(last - 7, last + 1)) for one in (whole.ids, whole.targets))
    assert "content_lost" in line_of(row, [Trained(ids, targets, 0)], vocabulary, limit=1000).findings


def test_a_chat_without_a_user_is_named_and_plain_text_is_not(vocabulary: Vocabulary) -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": ANSWER}]}
    lone, text = (
        format_of([*cells], "rows").show(Row(cells, "rows", 1, 0)) for cells in (row, {"text": f"{QUESTION} {ANSWER}"})
    )
    assert [*content_findings(lone, vocabulary)] == ["roles"]
    unknown = Chat((Message("human", QUESTION), Message("gpt", ANSWER)))  # the preparation says that
    assert content_findings(text, vocabulary) == content_findings(unknown, vocabulary) == {}


def test_reasoning_alone_is_an_empty_answer_and_a_call_is_none(vocabulary: Vocabulary) -> None:
    for further, empty in (({"thinking": "France."}, True), ({"thinking": "France.", "tool_calls": [CALL]}, False)):
        row = Chat((Message("user", QUESTION), Message("assistant", " ", further)))
        assert ("empty_answer" in content_findings(row, vocabulary)) == empty


def test_a_number_is_no_empty_answer(vocabulary: Vocabulary) -> None:
    columns = {"instruction": QUESTION, "input": ""}
    for output, name in ((14, "dropped"), ("", "empty_answer")):
        row = Row({**columns, "output": output}, "rows.jsonl", 1, 0)
        assert audited([row], format_of([*columns, "output"], "rows.jsonl"), vocabulary, 64)[0].findings == [name]


def test_places_are_those_of_the_bytes(tokenizer: Any, vocabulary: Vocabulary) -> None:
    text = "naïve 漢字 <|im_end|> end"
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert vocabulary.text(ids.tolist()) == text.encode()
    spans = locate([Message("user", "漢字"), Message("assistant", "end")], ids, vocabulary)
    assert [vocabulary.text(ids[s.start : s.end].tolist()).decode() for s in spans if s] == ["漢字", "end"]


def test_packed_rows_are_unpacked_and_padding_is_left_out() -> None:
    ids = [5, 6, 7, 8, 9, 0, 0]
    labels = [*ids[:5], IGNORED, IGNORED]
    packed = [
        {"input_ids": ids[:5], "labels": labels[:5], "seq_lengths": [2, 3]},
        {"input_ids": ids, "labels": labels, "attention_mask": [1, 1, 2, 2, 2, 0, 0]},
        {
            "input_ids": ids,
            "labels": labels,
            "position_ids": [0, 1, 0, 1, 2, 0, 0],
            "attention_mask": [1] * 5 + [0] * 2,
        },
    ]
    for row in packed:
        parts = [*sequences_of([row])]
        assert [part.ids.tolist() for part in parts] == [[5, 6], [7, 8, 9]]
        assert [part.targets.tolist() for part in parts] == [[IGNORED, 6], [IGNORED, 8, 9]]
    (masked,) = sequences_of([{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}])
    assert masked.targets.tolist() == [IGNORED, IGNORED, 3]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "2 labels for 3 tokens"),
        ({"input_ids": ["a"]}, "invalid literal"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, "rejected_ids"),
    ],
)
def test_a_damaged_prepared_row_is_named(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"row 1 of the prepared set is damaged .*{problem}"):
        list(sequences_of([{"input_ids": [1]}, row]))
