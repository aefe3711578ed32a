"""A dry run shows the text of generation samples, and of the tokens with a loss."""

from byte_tokenizers import CHATML, byte_tokenizer
from tables import rows_of
from tsqlora.data.chat import find_format
from tsqlora.data.tokens import tokenise_generation
from tsqlora.run.plan import shown_samples


def shown(row: dict, *, seq2seq: bool = False, merges: tuple = (), chat: str | None = None) -> str:
    tokenizer = byte_tokenizer(merges=merges, chat_template=chat)
    format = find_format(list(row), source="a.jsonl")
    split = tokenise_generation(rows_of(row), format, tokenizer, max_length=4000, seq2seq=seq2seq)
    return shown_samples(tokenizer, split)


def test_the_whole_text_and_that_of_the_targets_are_shown() -> None:
    assert shown({"prompt": "2 + 2 =", "completion": " 4"}) == (
        "sample 1: 11 tokens\n<s>2 + 2 = 4</s>\nwith a loss: 3 tokens\n 4</s>\n"
    )
    assert shown({"prompt": "ab", "completion": "c"}, seq2seq=True) == (
        "sample 1: 3 tokens\n<s>ab\nwith a loss: 3 tokens\n<s>c</s>\n"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    learned = shown({"messages": turns}, chat=CHATML).partition("with a loss")[2]
    assert learned.count("b<|im_end|>") == 2
    assert "user" not in learned


def test_long_texts_are_shortened_and_control_characters_are_not_printed() -> None:
    text = shown({"prompt": "a" * 1000 + "\x1b[31m", "completion": "c"})
    assert len(text) < 800
    assert " … " in text
    assert "\x1b" not in text
