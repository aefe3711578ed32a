"""One row against the tokens and labels that were made of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from byte_tokenizers import byte_tokenizer
from tsqlora.data.chat import Conversation, Message, conversation, format_of
from tsqlora.errors import DataError
from tsqlora.tasks.generation import IGNORED
from tsqlora.text.ledger import Line, content_findings, line_of, locate
from tsqlora.text.prepared import Trained, sequences_of
from tsqlora.text.vocabulary import Vocabulary, vocabulary_of

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


def chat(*contents: str, row: int = 0) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    return Conversation(row, tuple(map(Message, roles, contents)))


def trained(tokenizer: Any, conversation: Conversation, *, keep: slice = slice(None), stop: bool = True) -> Trained:
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


def line(tokenizer: Any, vocabulary: Vocabulary, conversation: Conversation, **how: Any) -> Line:
    return line_of(conversation, [trained(tokenizer, conversation, **how)], vocabulary)


def test_a_right_row_has_no_finding(tokenizer: Any, vocabulary: Vocabulary) -> None:
    for row in (chat(QUESTION, ANSWER), chat(QUESTION, ANSWER, "And of Spain?", f"  {ANSWER} ü 漢\n")):
        result = line(tokenizer, vocabulary, row)
        assert (result.findings, result.fate, result.stop_trained, result.lost_tokens) == ([], "trained", True, 0)
        answers = sum(len(tokenizer(m.content.strip())["input_ids"]) for m in row.messages[1::2])
        assert (result.answer_tokens, result.trained_tokens) == (answers, answers + len(row.messages) // 2)


def test_a_cut_answer_is_counted_and_a_stop_behind_it_is_an_error(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(QUESTION, ANSWER)
    whole = trained(tokenizer, row)
    end = len(whole.ids) - 2  # before <|im_end|> and the line feed
    result = line(tokenizer, vocabulary, row, keep=slice(0, end - 10))
    assert (result.findings, result.fate, result.lost_tokens, result.stop_trained) == (["answer_cut"], "cut", 10, None)
    stop = whole.ids[end]
    ended = Trained(np.r_[whole.ids[: end - 10], stop], np.r_[whole.targets[: end - 10], stop], 0)
    assert "cut_then_stop" in line_of(row, [ended], vocabulary).findings


def test_a_stop_may_stand_on_the_first_token_of_the_next_turn(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """As LLaMA-Factory's efficient_eos puts it: the label differs from the token."""
    row = chat(QUESTION, ANSWER, QUESTION, ANSWER)
    one = trained(tokenizer, row, stop=False)
    assert line_of(row, [one], vocabulary).findings == ["stop_not_trained"]
    targets = one.targets.copy()
    targets[len(one.ids) - 2] = next(iter(vocabulary.stops))
    assert line_of(row, [Trained(one.ids, targets, 0)], vocabulary).findings == []


def test_what_the_mask_leaves_out_or_takes_in(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(QUESTION, ANSWER, QUESTION, ANSWER)
    one = trained(tokenizer, row)
    nothing = line_of(row, [Trained(one.ids, np.full(len(one.ids), IGNORED), 0)], vocabulary)
    assert (nothing.findings, nothing.fate) == (["nothing_trained"], "nothing to train")
    assert line_of(row, [Trained(one.ids, one.ids, 0)], vocabulary).findings == ["prompt_trained"]
    last = one.targets.copy()
    last[: len(one.ids) // 2] = IGNORED
    assert line_of(row, [Trained(one.ids, last, 0)], vocabulary).findings == ["only_last_answer"]


def test_content_that_is_not_among_the_tokens_is_lost(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(QUESTION, ANSWER, "And of Spain, which is in Europe?", ANSWER)
    without = trained(tokenizer, chat(QUESTION, ANSWER, "x", ANSWER))
    assert "content_lost" in line_of(row, [without], vocabulary).findings


def test_a_prompt_that_lacks_its_end_before_an_answer_is_lost(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row, text = chat(QUESTION, ANSWER), QUESTION.encode()
    whole = trained(tokenizer, row)
    end = vocabulary.text(whole.ids.tolist()).index(text) + len(text)
    last = np.searchsorted(vocabulary.ends(whole.ids), end)
    ids, targets = (np.delete(one, slice(last - 7, last + 1)) for one in (whole.ids, whole.targets))
    part = Trained(ids, targets, row.row)
    assert vocabulary.text(part.ids.tolist()).count(text[:-8]) == 1
    assert "content_lost" in line_of(row, [part], vocabulary, limit=1000).findings


@pytest.mark.parametrize(
    ("contents", "name"),
    [
        ((QUESTION, " "), "empty_answer"),
        ((QUESTION, f"{QUESTION} {ANSWER}"), "copies_prompt"),
        ((QUESTION, f"{ANSWER}<|im_end|>"), "template_twice"),
        ((QUESTION, f"{ANSWER}\n### Instruction: more"), "broken_characters"),
        ((QUESTION, "It is a cafÃ© in Paris"), "broken_characters"),
        ((QUESTION, f"<p>{ANSWER}</p>"), "html"),
        ((QUESTION,), "roles"),
    ],
)
def test_contents_show_it(tokenizer: Any, vocabulary: Vocabulary, contents: Sequence[str], name: str) -> None:
    assert name in line(tokenizer, vocabulary, chat(*contents)).findings


def test_a_chat_without_a_user_is_named_and_plain_text_is_not(vocabulary: Vocabulary) -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": ANSWER}]}
    lone, text = (
        conversation(cells, format_of([*cells], "rows"), 0) for cells in (row, {"text": f"{QUESTION} {ANSWER}"})
    )
    assert [*content_findings(lone, vocabulary)] == ["roles"]
    unknown = Conversation(0, (Message("human", QUESTION), Message("gpt", ANSWER)))  # the preparation says that
    assert content_findings(text, vocabulary) == content_findings(unknown, vocabulary) == {}


@pytest.mark.parametrize(
    "answer", ["Write `<b>` for bold, and <3 for a heart.", "```html\n<p>Paris</p>\n```", "a < b > c"]
)
def test_html_in_code_is_no_finding(tokenizer: Any, vocabulary: Vocabulary, answer: str) -> None:
    assert line(tokenizer, vocabulary, chat(QUESTION, answer)).findings == []


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("<think>\nIn Europe.\n</think>\nIt is Paris.", "<think>\nIn Europe.\n</think>\n\nIt is Paris."),
        ("<think>\nIn Europe.\n</think>It is Paris.", "<think>\nIn Europe.\n</think>\n\nIt is Paris."),
        ("<think>\n\n</think>\nIt is Paris.", "<think>\n\n</think>\n\nIt is Paris."),
        ("<think>\n\n</think>\nIt is Paris.", "It is Paris."),
    ],
)
def test_other_blanks_behind_reasoning_and_empty_reasoning_lose_nothing(
    source: str, written: str, tokenizer: Any, vocabulary: Vocabulary
) -> None:
    line = line_of(chat(QUESTION, source), [trained(tokenizer, chat(QUESTION, written))], vocabulary)
    assert (line.findings, line.fate, line.stop_trained) == ([], "trained", True)


def test_a_template_may_write_between_the_paragraphs_of_a_prompt(tokenizer: Any, vocabulary: Vocabulary) -> None:
    source = chat(f"Translate this.\n\n{QUESTION}", ANSWER)
    whole = trained(tokenizer, chat(f"Translate this.\n\n### Input:\n{QUESTION}", ANSWER))
    lost = trained(tokenizer, chat(f"### Input:\n{QUESTION}", ANSWER))
    assert line_of(source, [whole], vocabulary).findings == []
    assert "content_lost" in line_of(source, [lost], vocabulary, limit=1000).findings


def test_reasoning_alone_is_an_empty_answer_and_a_call_is_none(vocabulary: Vocabulary) -> None:
    ask, call = Message("user", QUESTION), {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    alone = Conversation(0, (ask, Message("assistant", " ", {"thinking": "France."})))
    assert "empty_answer" in content_findings(alone, vocabulary)
    called = Conversation(0, (ask, Message("assistant", "", {"thinking": "France.", **call})))
    assert "empty_answer" not in content_findings(called, vocabulary)


def test_a_summary_that_begins_with_its_document_copies_the_prompt(vocabulary: Vocabulary) -> None:
    source = chat(f"{QUESTION}\n\nTL;DR:", f"{QUESTION} {ANSWER}")
    assert "copies_prompt" in content_findings(source, vocabulary)


def test_reasoning_of_earlier_answers_may_be_left_out(tokenizer: Any, vocabulary: Vocabulary) -> None:
    reasoning = "<think>\nFrance is in Europe.\n</think>\n\n"
    source = chat(QUESTION, reasoning + ANSWER, "And of Spain?", f"{reasoning}Madrid.")
    rendered = trained(tokenizer, chat(QUESTION, ANSWER, "And of Spain?", f"{reasoning}Madrid."))
    result = line_of(source, [rendered], vocabulary)
    assert (result.findings, result.fate, result.lost_tokens) == (["reasoning_stripped"], "trained", 0)
    rendered = trained(tokenizer, chat(QUESTION, "no", "And of Spain?", f"{reasoning}Madrid."))
    assert "content_lost" in line_of(source, [rendered], vocabulary).findings


def test_reasoning_that_the_last_answer_lacks_is_lost(tokenizer: Any, vocabulary: Vocabulary) -> None:
    source = chat(QUESTION, ANSWER, "And of Spain?", "<think>\nSpain is in Europe, too.\n</think>\n\nIt is Madrid.")
    stripped = trained(tokenizer, chat(QUESTION, ANSWER, "And of Spain?", "It is Madrid."))
    assert line_of(source, [stripped], vocabulary).findings == ["content_lost"]
    cut = trained(tokenizer, source, keep=slice(-45, None))
    result = line_of(source, [cut], vocabulary, limit=45)
    assert (result.findings, result.fate) == (["answer_cut"], "cut")


def test_a_tool_call_that_the_template_leaves_out_is_lost(tokenizer: Any, vocabulary: Vocabulary) -> None:
    call = {"type": "function", "function": {"name": "capital", "arguments": {"country": "France"}}}
    first, last = Message("user", f"Use capital. {QUESTION}"), Message("assistant", f"The capital: {ANSWER}")
    source = Conversation(0, (first, Message("assistant", "", {"tool_calls": [call]}), Message("tool", "Paris"), last))
    written = Conversation(0, (first, Message("assistant", "{'name': 'capital'}"), Message("tool", "Paris"), last))
    assert line_of(source, [trained(tokenizer, source)], vocabulary).findings == ["content_lost"]
    assert line_of(source, [trained(tokenizer, written)], vocabulary).findings == []
    cut = trained(tokenizer, source, keep=slice(0, 80))
    assert "content_lost" not in line_of(source, [cut], vocabulary, limit=80).findings


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
