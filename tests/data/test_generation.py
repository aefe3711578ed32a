"""Prompt and target meet between two tokens; only targets are trained on; what is cut is the prompt."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from byte_tokenizers import BOS, CHATML, EOS, byte_tokenizer
from tables import names_of, rows_of
from tsqlora.data import tokens
from tsqlora.data.batches import IGNORED
from tsqlora.data.chat import Format, find_format
from tsqlora.data.rows import Row, sample_hash
from tsqlora.data.sources import open_table
from tsqlora.data.table import Samples
from tsqlora.data.tokens import left_out, references, tokenise_generation
from tsqlora.errors import DataError, SettingsError, TsqLoraError

BYTES, CHATTY, T5 = byte_tokenizer(), byte_tokenizer(chat_template=CHATML), byte_tokenizer(opens=False, closes=True)
WORDS = st.text(alphabet="ab é日\n", min_size=1, max_size=12).filter(str.strip)


def pairs(*pairs: tuple[Any, Any]) -> list[Row]:
    return rows_of(*({"prompt": prompt, "completion": completion} for prompt, completion in pairs))


def format_of(rows: Sequence[Row]) -> Format:
    return find_format(names_of(rows), source=rows[0].source)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase = BYTES,
    *,
    max_length: int = 400,
    seq2seq: bool = False,
    **options: Any,
) -> Samples:
    return tokenise_generation(rows, format_of(rows), tokenizer, max_length=max_length, seq2seq=seq2seq, **options)


def error(kind: type[TsqLoraError], rows: Sequence[Row], *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        make(rows, *args, **options)
    return str(caught.value)


def shown(tokenizer: PreTrainedTokenizerBase, sample: dict[str, Any]) -> tuple[str, str]:
    """The whole sample, and what of it is trained on."""
    trained = [token for token in sample["labels"] if token != IGNORED]
    return str(tokenizer.decode(sample["input_ids"])), str(tokenizer.decode(trained))


def test_a_target_and_its_end_are_trained_on_and_the_prompt_is_not() -> None:
    (sample,) = make(pairs(("ab", "c")))
    a, b, c = BYTES("abc", add_special_tokens=False)["input_ids"]
    assert sample == {
        "input_ids": [BOS, a, b, c, EOS],
        "attention_mask": [1] * 5,
        "labels": [IGNORED] * 3 + [c, EOS],
    }


def test_an_end_that_is_there_is_not_doubled() -> None:
    assert list(make(pairs(("ab", "c</s>")))) == list(make(pairs(("ab", "c"))))


def test_plain_text_is_trained_on_but_for_a_token_that_follows_from_nothing() -> None:
    assert shown(BYTES, make(rows_of({"text": "abc"}))[0]) == ("<s>abc</s>", "abc</s>")
    bare = byte_tokenizer(opens=False)
    assert shown(bare, make(rows_of({"text": "abc"}), bare)[0]) == ("abc</s>", "bc</s>")


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_a_prompt_alone_has_the_tokens_that_it_is_trained_with(texts: list[tuple[str, str]]) -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b"), ("Ġ", "a"), ("b", "b"), ("Ġ", "Ġ"), ("Ċ", "Ċ")])
    whole, alone = make(pairs(*texts), tokenizer), make(pairs(*texts), tokenizer, with_targets=False)
    for (prompt, target), sample, prompts in zip(texts, whole, alone, strict=True):
        length = len(prompts["input_ids"])
        assert sample["input_ids"][:length] == prompts["input_ids"]
        assert sample["labels"] == [IGNORED] * length + sample["input_ids"][length:]
        assert shown(tokenizer, sample) == (f"<s>{prompt}{target}</s>", f"{target}</s>")
        assert "labels" not in prompts


def test_tokens_are_those_of_the_whole_text_where_none_lies_across() -> None:
    tokenizer = byte_tokenizer(opens=False, merges=[("Ġ", "a")])
    for prompt, target, parts in (("b", " a", ["b", "Ġa"]), ("b ", "a", ["b", "Ġ", "a"])):
        sample = make(pairs((prompt, target)), tokenizer)[0]
        assert tokenizer.convert_ids_to_tokens(sample["input_ids"])[:-1] == parts


def test_a_long_prompt_loses_its_beginning_but_not_what_opens_every_text() -> None:
    split = make(pairs(("abcdef", "gh"), ("a", "b")), max_length=6)
    assert [shown(BYTES, sample) for sample in split] == [("<s>efgh</s>", "gh</s>"), ("<s>ab</s>", "b</s>")]
    assert split.truncated == 1
    prompts = make(pairs(("abcdef", "gh")), max_length=4, with_targets=False)
    assert (BYTES.decode(prompts[0]["input_ids"]), prompts.truncated) == ("<s>def", 1)


def test_long_plain_text_loses_its_end() -> None:
    split = make(rows_of({"text": "abcdef"}, {"text": "ab"}), max_length=4)
    assert [shown(BYTES, sample) for sample in split] == [("<s>abc", "abc"), ("<s>ab</s>", "ab</s>")]
    assert split.truncated == 1


def test_a_row_whose_target_does_not_fit_whole_is_left_out_and_named() -> None:
    rows = pairs(("a", "bcd"), ("a", "bcde"), ("abc", "bcdefgh"))
    assert left_out(whole := make(rows, max_length=10)) == []
    assert whole.truncated == 1  # the last prompt keeps one token
    split = make(rows, max_length=6)
    np.testing.assert_array_equal(split.ids, [0])
    assert (list(split), split.hashes) == (whole[:1], whole.hashes[:1])
    assert split.left_out == (("train.jsonl:8", 7), ("train.jsonl:9", 10))
    assert left_out(split)[0].endswith(": train.jsonl:8, train.jsonl:9")
    assert left_out(make(pairs(*[("a", "bcdefgh")] * 4), max_length=6))[0].endswith("8, train.jsonl:9, …")


@pytest.mark.parametrize(
    ("row", "column"), [(("a", " "), "completion"), (("a", None), "completion"), ((["a"], "b"), "prompt")]
)
def test_bad_rows_are_named(row: tuple[Any, Any], column: str) -> None:
    message = error(DataError, pairs(("a", "b"), row))
    assert message.startswith("train.jsonl:8: ")
    assert f"'{column}'" in message


def test_room_for_text_is_asked_for() -> None:
    message = error(SettingsError, pairs(("a", "b")), max_length=2)
    assert "data.max_length 2" in message
    assert "set it to 3" in message


def test_a_chat_is_trained_on_every_answer_as_its_template_writes_it() -> None:
    chat = [say("system", "s"), say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]
    tokenizer = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>")
    sample = make(rows_of({"messages": chat}), tokenizer)[0]
    assert shown(tokenizer, sample) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>",
        "b<|im_end|>d<|im_end|>",
    )
    rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    assert sample["input_ids"] == tokenizer(rendered.rstrip(), add_special_tokens=False)["input_ids"]


def test_what_a_chat_is_asked_is_what_it_is_trained_with() -> None:
    rows = rows_of({"messages": [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]})
    tokenizer = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>", merges=[("Ċ", "d"), ("Ċ", "b")])
    whole, prompts = make(rows, tokenizer)[0], make(rows, tokenizer, with_targets=False)[0]
    length = len(prompts["input_ids"])
    assert whole["input_ids"][:length] == prompts["input_ids"]
    assert tokenizer.decode(whole["input_ids"][length:]) == "d<|im_end|>"
    assert references(rows, format_of(rows)) == ["d"]


TURNS = "<s>{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}|{% endfor %}"


def test_of_a_long_chat_whole_exchanges_go_the_oldest_first_and_the_system_prompt_stays() -> None:
    chat = [say("user", "a"), say("assistant", "bcdef"), say("user", "g"), say("assistant", "h")]
    rows = rows_of({"messages": [say("system", "S"), *chat, say("user", "i"), say("assistant", "j")]})
    tokenizer = byte_tokenizer(chat_template=TURNS)
    whole = make(rows, tokenizer)[0]
    assert shown(tokenizer, whole) == ("<s>[s]S|[u]a|[a]bcdef|[u]g|[a]h|[u]i|[a]j|", "[a]bcdef|[a]h|[a]j|")
    cut = make(rows, tokenizer, max_length=len(whole["input_ids"]) - 1)
    assert shown(tokenizer, cut[0]) == ("<s>[s]S|[u]g|[a]h|[u]i|[a]j|", "[a]h|[a]j|")
    assert cut.truncated == 1
    least = make(rows, tokenizer, max_length=16)
    assert shown(tokenizer, least[0]) == ("<s>[s]S|[u]i|[a]j|", "[a]j|")
    assert make(rows, tokenizer, max_length=15).left_out == (("train.jsonl:7", 16),)
    # Without an answer to learn, a last turn that is too long loses its beginning.
    prompt = make(rows, tokenizer, max_length=8, with_targets=False)[0]
    assert tokenizer.decode(prompt["input_ids"]) == "<s>S|[u]i|"


def test_a_start_token_that_marks_turns_is_not_doubled_where_a_prompt_is_cut() -> None:
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    rows = rows_of({"messages": [say("user", "a"), say("user", "bcd")]})
    prompt = make(rows, tokenizer, max_length=3, with_targets=False)[0]
    assert tokenizer.decode(prompt["input_ids"]) == "cd<s>"


def test_a_template_that_rewrites_the_last_prompt_trains_the_last_answer_as_it_stands_in_the_whole_chat() -> None:
    rows = rows_of({"messages": [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]})
    tokenizer = byte_tokenizer(
        chat_template="{{ messages | length }}{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    )
    assert shown(tokenizer, make(rows, tokenizer)[0]) == ("4a|b|c|d|", "d|")
    silent = byte_tokenizer(chat_template="{{ messages | length }}")
    assert "train.jsonl:7: the chat template does not write the last answer" in error(DataError, rows, silent)


# As Qwen3 does: only the last answer has its thoughts, so that each further turn rewrites what stands before.
THINKS = (
    "{% for m in messages %}<s>{{ m['role'] }} {% if m['role'] == 'assistant' and loop.last %}()"
    "{% endif %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.mark.parametrize("further", [[], [say("assistant", "d"), say("user", "e")]])
def test_what_is_asked_stands_there_once_though_the_template_rewrites_what_stands_before(further: list[Any]) -> None:
    tokenizer = byte_tokenizer(chat_template=THINKS)
    chat = [say("user", "a"), say("assistant", "b"), say("user", "c"), *further]
    prompts = make(rows_of({"messages": chat}), tokenizer, with_targets=False)[0]
    rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert prompts["input_ids"] == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_where_the_template_rewrites_earlier_answers_the_last_one_alone_is_learned() -> None:
    tokenizer = byte_tokenizer(chat_template=THINKS)
    chat = [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]
    sample = make(rows_of({"messages": chat}), tokenizer)[0]
    prompt = make(rows_of({"messages": chat[:3]}), tokenizer, with_targets=False)[0]["input_ids"]
    assert sample["input_ids"][: len(prompt)] == prompt
    assert sample["labels"] == [-100] * len(prompt) + sample["input_ids"][len(prompt) :]
    assert tokenizer.decode(sample["input_ids"][len(prompt) :]) == "()d"


def test_of_an_answer_that_begins_a_chat_the_templates_header_is_not_trained_on() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>")
    chat = [say("assistant", "hi"), say("user", "a"), say("assistant", "b")]
    assert shown(tokenizer, make(rows_of({"messages": chat}), tokenizer)[0])[1] == "hi<|im_end|>b<|im_end|>"
    alone = rows_of({"messages": chat[:1]})
    assert shown(tokenizer, make(alone, tokenizer)[0])[1] == "hi<|im_end|>"
    assert len(make(alone, tokenizer, max_length=3).left_out) == 1


def test_what_is_measured_goes_on_from_what_its_answer_followed() -> None:
    """Though the chat ends with a further question."""
    chat = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    rows = rows_of({"messages": chat})
    prompts, measured = (make(rows, CHATTY, with_targets=False, measured=of)[0] for of in (False, True))
    assert references(rows, format_of(rows)) == ["b"]
    assert measured == make(rows_of({"messages": chat[:1]}), CHATTY, with_targets=False)[0]
    assert str(CHATTY.decode(prompts["input_ids"])).count("user") == 2


def test_tools_and_tool_calls_are_written_by_a_template_that_takes_them() -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}|{% endif %}"
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}|{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]}
    chat = {"messages": [say("user", "a"), call, say("tool", "b"), say("assistant", "c")]}
    tokenizer = byte_tokenizer(chat_template=template)
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        sample = make(rows_of({**chat, "tools": tools}), tokenizer)[0]
        called = '[{"name": "f", "arguments": null}]'
        assert shown(tokenizer, sample) == (f'[{{"name": "f"}}]|a|{called}|b|c|', f"{called}|c|")
    assert "'tool_calls'" in error(DataError, rows_of(chat), CHATTY)
    assert "'tools'" in error(
        DataError, rows_of({"messages": chat["messages"][:1] + chat["messages"][3:], "tools": [{"name": "f"}]}), CHATTY
    )


def test_of_a_prompt_that_is_a_chat_no_answer_is_trained_on() -> None:
    prompt = [say("system", "s"), say("user", "a"), say("assistant", "b"), say("user", "c")]
    tokenizer = byte_tokenizer(chat_template=TURNS)
    for answer in ([say("assistant", "d")], "d"):
        rows = rows_of({"prompt": prompt, "completion": answer})
        assert shown(tokenizer, make(rows, tokenizer)[0]) == ("<s>[s]s|[u]a|[a]b|[u]c|[a]d|", "[a]d|")
        assert references(rows, format_of(rows)) == ["d"]
    alone = make(rows, tokenizer, with_targets=False)[0]
    assert tokenizer.decode(alone["input_ids"]) == "<s>[s]s|[u]a|[a]b|[u]c|"


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), (None, "template")],
)
def test_a_template_that_refuses_the_roles_or_is_not_there_is_told(template: str | None, message: str) -> None:
    rows = rows_of({"messages": [say("user", "a"), say("assistant", "b")]})
    result = error(DataError, rows, byte_tokenizer(chat_template=template))
    assert result.startswith("train.jsonl:7: ")
    assert message in result


def test_a_tokenizer_without_an_end_is_refused() -> None:
    assert "eos_token" in error(SettingsError, pairs(("a", "b")), byte_tokenizer(eos=None))
    # A sequence-to-sequence model's may close with another token, as BERT's does.
    closing = byte_tokenizer(closes=True, eos=None)
    assert make(pairs(("a", "b")), closing, seq2seq=True)[0]["labels"][-1] == EOS


def test_sequence_to_sequence_reads_the_prompt_and_writes_the_target() -> None:
    sample = make(pairs(("ab", "c")), T5, seq2seq=True)[0]
    assert (T5.decode(sample["input_ids"]), T5.decode(sample["labels"])) == ("ab</s>", "c</s>")
    # Where the tokenizer closes nothing, the target is closed all the same.
    assert BYTES.decode(make(pairs(("ab", "c")), seq2seq=True)[0]["labels"]) == "<s>c</s>"


def test_a_long_source_is_cut_on_the_left_and_a_long_target_is_left_out() -> None:
    split = make(pairs(("abcdef", "gh")), T5, seq2seq=True, max_length=4)
    assert (T5.decode(split[0]["input_ids"]), T5.decode(split[0]["labels"])) == ("def</s>", "gh</s>")
    assert split.truncated == 1
    long = make(pairs(("ab", "cdef")), T5, seq2seq=True, max_length=4)
    assert long.left_out == (("train.jsonl:7", 5),)


def test_samples_do_not_depend_on_their_neighbours() -> None:
    texts = [("ab", "cd"), ("abcdefghi", "j"), ("x", "y")]
    together = make(pairs(*texts), max_length=8)
    for pair, sample, name in zip(texts, together, together.hashes, strict=True):
        alone = make(pairs(pair), max_length=8)
        assert (alone[0], alone.hashes[0]) == (sample, name)


def test_hashes_are_of_prompt_input_and_target() -> None:
    split = make(rows_of({"instruction": "a", "input": "b", "output": "c"}))
    assert split.hashes == (sample_hash("a", "b", "c"),)
    assert make(rows_of({"text": "a"})).hashes == (sample_hash("a", "", ""),)


def test_a_chat_has_one_hash_whatever_the_order_of_its_keys() -> None:
    user, answer = say("user", "a"), say("assistant", "b")
    turned = dict(reversed(answer.items()))
    one, other = (make(rows_of({"messages": [user, last]}), CHATTY).hashes for last in (answer, turned))
    assert one == other


@pytest.mark.parametrize("name", ["alpaca", "scitldr", "xsum"])
def test_real_rows(shared_dir: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    rows = list(open_table(shared_dir / "data" / name / "validation.jsonl"))
    format = format_of(rows)
    split = tokenise_generation(rows, format, tokenizer, max_length=4096, seq2seq=False)
    for sample, target in zip(split, references(rows, format), strict=True):
        assert sample["input_ids"][0] == tokenizer.bos_token_id
        trained = [token for token in sample["labels"] if token != IGNORED]
        assert str(tokenizer.decode(trained, skip_special_tokens=True)).strip() == target


def test_chats_for_a_tokenizer_without_a_template_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"put a chat_template\.jinja into its folder"):
        make(rows_of({"messages": [say("user", "a"), say("assistant", "b")]}), byte_tokenizer())


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 10 ** 15 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__ }}",
        # jinja2 before 3.1.6 lets it out of its sandbox.
        "{{ ('{0.__class__.__init__.__globals__}'|attr('format'))(self) }}",
    ],
)
def test_what_a_template_of_a_stranger_does_ends_as_an_error_of_the_row(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SECONDS", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DataError, match="template refuses these turns"):
        make(rows_of({"messages": [say("user", "a"), say("assistant", "b")]}), byte_tokenizer(chat_template=template))
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
