"""The trained part of a generation sample stands between marks."""

from byte_tokenizers import CHATML, byte_tokenizer
from tsqlora.data.formats import find_format
from tsqlora.data.generation import tokenise_generation
from tsqlora.data.rows import Rows
from tsqlora.run.plan import marked_samples


def shown(row: dict, *, seq2seq: bool = False, merges: tuple = (), chat: str | None = None) -> str:
    tokenizer = byte_tokenizer(merges=merges, chat_template=chat)
    format = find_format(list(row), source="a.jsonl")
    split = tokenise_generation(Rows((row,), "a.jsonl", (1,)), format, tokenizer, max_length=4000, seq2seq=seq2seq)
    return marked_samples(tokenizer, split.samples)


def test_targets_stand_between_marks() -> None:
    assert shown({"prompt": "2 + 2 =", "completion": " 4"}) == (
        "sample 1: 11 tokens, trained on ⟦3⟧\n<s>2 + 2 =⟦ 4</s>⟧\n"
    )
    assert shown({"prompt": "é", "completion": "日"}, merges=(("Ã", "©"),)) == (
        "sample 1: 6 tokens, trained on ⟦4⟧\n<s>é⟦日</s>⟧\n"
    )


def test_every_answer_of_a_chat_is_marked() -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    assert shown({"messages": turns}, chat=CHATML).count("assistant\n⟦b<|im_end|>") == 2


def test_what_a_model_writes_beside_its_input_is_marked() -> None:
    assert shown({"prompt": "ab", "completion": "c"}, seq2seq=True) == (
        "sample 1: 6 tokens, trained on ⟦3⟧\n<s>ab⟦<s>c</s>⟧\n"
    )


def test_long_texts_are_shortened_and_what_steers_a_terminal_is_not_printed() -> None:
    text = shown({"prompt": "a" * 1000 + "\x1b[31m", "completion": "c"})
    assert len(text) < 800
    assert " … " in text
    assert "\x1b" not in text
