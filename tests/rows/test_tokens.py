"""Prompt and target meet between two tokens; only targets are trained on; what is cut is the prompt."""

import hashlib
import logging
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from byte_tokenizers import BOS, CHATML, EOS, byte_tokenizer
from tables import names_of, rows_of
from tsqlora.errors import DataError, SettingsError, TsqLoraError
from tsqlora.rows import tokens
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import Format, find_format
from tsqlora.rows.rows import Columns, Row, sample_hash
from tsqlora.rows.sources import open_table
from tsqlora.rows.table import Samples
from tsqlora.rows.tokens import left_out, references, tokenise, tokenise_generation

BYTES, CHATTY, T5 = byte_tokenizer(), byte_tokenizer(chat_template=CHATML), byte_tokenizer(opens=False, closes=True)
TURNS = "<s>{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}|{% endfor %}"
# As Qwen3 does: only the last answer has its thoughts, so that each further turn rewrites what stands before.
THINKS = {
    "chat_template": "{% for m in messages %}<s>{{ m['role'] }} {% if m['role'] == 'assistant' and loop.last %}()"
    "{% endif %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
}
COUNTS = {"chat_template": "{{ messages | length }}{% for m in messages %}{{ m['content'] }}|{% endfor %}"}
WORDS = st.text(alphabet="ab é日\n", min_size=1, max_size=12).filter(str.strip)


def pairs(*pairs: tuple[Any, Any]) -> list[Row]:
    return rows_of(*({"prompt": prompt, "completion": completion} for prompt, completion in pairs))


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages by their texts; the first letter is that of the role."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": names[text[0]], "content": text[1:]} for text in texts]


def chat(*texts: str) -> list[Row]:
    return rows_of({"messages": turns(*texts)})


def format_of(rows: Sequence[Row]) -> Format:
    return find_format(names_of(rows), source=rows[0].source)


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
    trained = [token for token in sample.get("labels", ()) if token != IGNORED]
    return str(tokenizer.decode(sample["input_ids"])), str(tokenizer.decode(trained))


def test_a_target_and_its_end_are_trained_on_and_the_prompt_is_not() -> None:
    (sample,) = make(pairs(("ab", "c")))
    a, b, c = BYTES("abc", add_special_tokens=False)["input_ids"]
    assert sample == {"input_ids": [BOS, a, b, c, EOS], "attention_mask": [1] * 5, "labels": [IGNORED] * 3 + [c, EOS]}
    assert list(make(pairs(("ab", "c</s>")))) == [sample], "an end that is there is not doubled"


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


@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=4), st.booleans())
def test_samples_do_not_depend_on_their_neighbours(texts: list[tuple[str, str]], seq2seq: bool) -> None:
    how: dict[str, Any] = {"max_length": 8, "seq2seq": seq2seq}
    together, places = make(pairs(*texts), **how), iter(range(len(texts)))
    for j, pair in enumerate(texts):
        alone = make(pairs(pair), **how)
        assert list(alone) == ([together[next(places)]] if j in together.ids else [])


LONG = ("sS", "ua", "abcdef", "ug", "ah", "ui", "aj")
ENDS, CLOSES = {"chat_template": CHATML, "eos": "<|im_end|>"}, {"opens": False, "closes": True}
IN_TURNS, PROMPTS = {"chat_template": TURNS}, {"with_targets": False}
TALK = "<s>user a<s>assistant b<s>user c"
HEAD = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("rows", "how", "options", "text", "trained"),
    [
        # Plain text is trained on but for a token that follows from nothing; of long text the end goes.
        (rows_of({"text": "abc"}), {}, {}, "<s>abc</s>", "abc</s>"),
        (rows_of({"text": "abc"}), {"opens": False}, {}, "abc</s>", "bc</s>"),
        (rows_of({"text": "abcdef"}), {}, {"max_length": 4}, "<s>abc", "abc"),
        # A long prompt loses its beginning, but not what opens every text.
        (pairs(("abcdef", "gh")), {}, {"max_length": 6}, "<s>efgh</s>", "gh</s>"),
        (pairs(("abcdef", "gh")), {}, {"max_length": 4, "with_targets": False}, "<s>def", ""),
        # Every answer is trained on as its template writes it, but not the header of one that begins the chat.
        (
            chat("ss", "ua", "ab", "uc", "ad"),
            ENDS,
            {},
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>",
            "b<|im_end|>d<|im_end|>",
        ),
        (chat("ahi"), ENDS, {}, f"{HEAD}hi<|im_end|>", "hi<|im_end|>"),
        (chat("ahi", "ua", "ab"), ENDS, {}, None, "hi<|im_end|>b<|im_end|>"),
        # Of a long chat whole exchanges go, the oldest first, and the system prompt stays.
        (chat(*LONG), IN_TURNS, {}, "<s>[s]S|[u]a|[a]bcdef|[u]g|[a]h|[u]i|[a]j|", "[a]bcdef|[a]h|[a]j|"),
        (chat(*LONG), IN_TURNS, {"max_length": 32}, "<s>[s]S|[u]g|[a]h|[u]i|[a]j|", "[a]h|[a]j|"),
        (chat(*LONG), IN_TURNS, {"max_length": 16}, "<s>[s]S|[u]i|[a]j|", "[a]j|"),
        # Without an answer to learn, a last turn that is too long loses its beginning.
        (chat(*LONG), IN_TURNS, {"max_length": 8, "with_targets": False}, "<s>S|[u]i|", ""),
        # Where the template rewrites earlier turns, the last answer alone is learned, as it stands in the whole chat.
        (chat("ua", "ab", "uc", "ad"), COUNTS, {}, "4a|b|c|d|", "d|"),
        (chat("ua", "ab", "uc", "ad"), THINKS, {}, f"{TALK}<s>assistant ()d", "()d"),
        (chat("ua", "ab", "uc"), THINKS, {"with_targets": False}, "<s>user a<s>assistant b<s>user c<s>assistant ", ""),
        # What is measured goes on from what its answer followed, though the chat ends with a further question.
        (chat("ua", "ab", "uc"), IN_TURNS, {"with_targets": False, "measured": True}, "<s>[u]a|", ""),
        (chat("ua", "ab", "uc"), IN_TURNS, PROMPTS, "<s>[u]a|[a]b|[u]c|", ""),
        # Of a prompt that is a chat no answer is trained on.
        *(
            (rows_of({"prompt": turns("ua", "ab", "uc"), "completion": one}), IN_TURNS, {}, None, "[a]d|")
            for one in (turns("ad"), "d")
        ),
        # A sequence-to-sequence model reads the prompt and writes the target, which is closed in any case.
        (pairs(("ab", "c")), CLOSES, {"seq2seq": True}, "ab</s>", "c</s>"),
        (pairs(("ab", "c")), {}, {"seq2seq": True}, None, "<s>c</s>"),
        (pairs(("abcdef", "gh")), CLOSES, {"seq2seq": True, "max_length": 4}, "def</s>", "gh</s>"),
    ],
)
def test_what_a_model_reads_and_what_it_learns(
    rows: list[Row], how: dict[str, Any], options: dict[str, Any], text: str | None, trained: str
) -> None:
    tokenizer = byte_tokenizer(**how)
    made = make(rows, tokenizer, **options)
    whole, learned = shown(tokenizer, made[0])
    assert learned == trained
    assert text in (None, whole)
    assert made.truncated == ("max_length" in options)
    has_prompt = how in (ENDS, IN_TURNS, THINKS) and len(rows[0].cells.get("messages", "ab")) > 1
    if has_prompt and not options:  # a prompt has the tokens that it has in training
        prompts = make(rows, tokenizer, with_targets=False)[0]["input_ids"]
        assert made[0]["input_ids"][: len(prompts)] == prompts
        assert references(rows, format_of(rows))[0] in trained


def test_a_start_token_that_marks_turns_is_not_doubled_where_a_prompt_is_cut() -> None:
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    prompt = make(chat("ua", "ubcd"), tokenizer, max_length=3, with_targets=False)[0]
    assert tokenizer.decode(prompt["input_ids"]) == "cd<s>"


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
    assert make(pairs(("ab", "cdef")), T5, seq2seq=True, max_length=4).left_out == (("train.jsonl:7", 5),)
    chatty = byte_tokenizer(chat_template=TURNS)
    assert make(chat(*LONG), chatty, max_length=15).left_out == (("train.jsonl:7", 16),)


def test_tools_and_tool_calls_are_written_by_a_template_that_takes_them() -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}|{% endif %}"
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}|{% endfor %}"
    )
    user, answer = turns("ua", "ac")
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]}
    calls = {"messages": [user, call, {"role": "tool", "content": "b"}, answer]}
    tokenizer = byte_tokenizer(chat_template=template)
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        sample = make(rows_of({**calls, "tools": tools}), tokenizer)[0]
        called = '[{"name": "f", "arguments": null}]'
        assert shown(tokenizer, sample) == (f'[{{"name": "f"}}]|a|{called}|b|c|', f"{called}|c|")
    assert "'tool_calls'" in error(DataError, rows_of(calls), CHATTY)
    assert "'tools'" in error(DataError, rows_of({"messages": [user, answer], "tools": [{"name": "f"}]}), CHATTY)


@pytest.mark.parametrize(
    ("kind", "rows", "how", "options", "message"),
    [
        (DataError, pairs(("a", "b"), ("a", " ")), {}, {}, r"train\.jsonl:8: .*'completion'"),
        (DataError, pairs(("a", "b"), ("a", None)), {}, {}, r"train\.jsonl:8: .*'completion'"),
        (DataError, pairs(("a", "b"), (["a"], "b")), {}, {}, r"train\.jsonl:8: .*'prompt'"),
        (SettingsError, pairs(("a", "b")), {}, {"max_length": 2}, r"data\.max_length 2 .*set it to 3"),
        (SettingsError, pairs(("a", "b")), {"eos": None}, {}, "eos_token"),
        (DataError, chat("ua", "ab"), {}, {}, r"train\.jsonl:7: .*put a chat_template\.jinja into its folder"),
        (
            DataError,
            chat("ua", "ab"),
            {"chat_template": "{{ raise_exception('roles must alternate') }}"},
            {},
            r"train\.jsonl:7: .*roles must alternate",
        ),
        (
            DataError,
            chat("ua", "ab"),
            {"chat_template": "{{ messages | length }}"},
            {},
            "does not write the last answer",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    kind: type[TsqLoraError], rows: list[Row], how: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(rows, byte_tokenizer(**how), **options)
    # A sequence-to-sequence model's targets may close with another token, as BERT's do.
    closing = byte_tokenizer(closes=True, eos=None)
    assert make(pairs(("a", "b")), closing, seq2seq=True)[0]["labels"][-1] == EOS


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
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of callbacks at the deepest recursion
def test_what_a_template_of_a_stranger_does_ends_as_an_error_of_the_row(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SECONDS", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    assert "template refuses these turns" in error(DataError, chat("ua", "ab"), byte_tokenizer(chat_template=template))
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_hashes_are_of_prompt_input_and_target_whatever_the_order_of_keys() -> None:
    assert make(rows_of({"instruction": "a", "input": "b", "output": "c"})).hashes == (sample_hash("a", "b", "c"),)
    assert make(rows_of({"text": "a"})).hashes == (sample_hash("a", "", ""),)
    user, answer = turns("ua", "ab")
    turned = dict(reversed(answer.items()))
    one, other = (make(rows_of({"messages": [user, last]}), CHATTY).hashes for last in (answer, turned))
    assert one == other


@pytest.mark.parametrize("name", ["alpaca", "scitldr", "xsum"])
def test_real_rows(shared_dir: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    rows = list(open_table(shared_dir / "data" / name / "validation.jsonl"))
    split = make(rows, tokenizer, max_length=4096)
    for sample, target in zip(split, references(rows, format_of(rows)), strict=True):
        assert sample["input_ids"][0] == tokenizer.bos_token_id
        trained = [token for token in sample["labels"] if token != IGNORED]
        assert str(tokenizer.decode(trained, skip_special_tokens=True)).strip() == target


# Texts with a label

TEXT, PAIR = Columns("text", None, "label"), Columns("text", "pair", "label")
CLS, SEP, A, B, C, D = range(2, 8)


def bert(model: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(model)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if isinstance(model, models.WordLevel):
        inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
        inner.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))  # pyright: ignore[reportAttributeAccessIssue]
    names = names if isinstance(model, models.WordLevel) else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_max_length=6, model_input_names=names
    )


VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d")
BERT = bert(models.WordLevel({word: j for j, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))


def texts(*values: Any) -> list[Row]:
    return rows_of(*({"text": value, "label": "x"} for value in values))


def test_samples_are_what_a_model_takes() -> None:
    split = tokenise(texts("a b", "c"), TEXT, BERT, max_length=8, labels=[1, 0])
    types, mask = {"token_type_ids": [0] * 4}, {"attention_mask": [1] * 4}
    assert split[0] == {"input_ids": [CLS, A, B, SEP], **types, **mask, "labels": 1}
    assert (len(split), split.lengths, split.truncated) == (2, [4, 3], 0)
    (pair,) = tokenise(rows_of({"text": "a", "pair": "b"}), PAIR, BERT, max_length=8, labels=None)
    assert (pair["input_ids"], pair["token_type_ids"]) == ([CLS, A, SEP, B, SEP], [0, 0, 0, 1, 1])
    (bare,) = tokenise(texts("a"), TEXT, bert(models.BPE({"[PAD]": 0, "a": 1}, [])), max_length=8, labels=None)
    assert bare == {"input_ids": [1], "attention_mask": [1]}


def test_only_what_is_longer_than_the_limit_is_cut_and_counted() -> None:
    whole = texts("a b", "a b c d", "a b c")
    split = tokenise(whole, TEXT, BERT, max_length=5, labels=None)
    assert [sample["input_ids"] for sample in split] == [[CLS, A, B, SEP], *[[CLS, A, B, C, SEP]] * 2]
    assert split.truncated == 1
    for j, row in enumerate(whole):
        alone = tokenise([row], TEXT, BERT, max_length=5, labels=None)
        assert (alone[0], alone.hashes[0]) == (split[j], split.hashes[j])
    rows = rows_of({"text": "a b c d", "pair": "d"}, {"text": "a", "pair": "b"})
    both = tokenise(rows, PAIR, BERT, max_length=5, labels=None)
    assert (both[0]["input_ids"], both.truncated) == ([CLS, A, SEP, D, SEP], 1), "of a pair the longer text is cut"


def test_long_text_is_no_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(BERT, "deprecation_warnings", {})  # it warns only once
    tokenise(texts("a b c d a b c d"), TEXT, BERT, max_length=6, labels=None)
    assert not caplog.records


def test_a_hash_is_of_text_pair_and_label_as_written() -> None:
    cells = ({"pair": "b", "label": 3}, {"pair": "b"}, {"pair": "b c"}, {"pair": "b", "label": "d"})
    split = tokenise(rows_of(*({"text": "a"} | row for row in cells)), PAIR, BERT, max_length=8, labels=None)
    expected = [b"a\x1fb\x1f3", b"a\x1fb\x1f", b"a\x1fb c\x1f", b"a\x1fb\x1fd"]
    assert split.hashes == tuple(hashlib.sha256(data).hexdigest()[:16] for data in expected)


def test_a_split_is_a_torch_data_set() -> None:
    split = tokenise(texts("a b", "c", "d"), TEXT, BERT, max_length=8, labels=[0.5, 1.0, 0.0])
    loader: DataLoader[Any] = DataLoader(split, 2, collate_fn=DataCollatorWithPadding(BERT))  # pyright: ignore[reportArgumentType]
    batches = list(loader)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (1, 3)]
    assert batches[0]["labels"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        *(({"text": missing}, TEXT, "no text in column 'text'") for missing in (None, "", " \n", math.nan)),
        ({"label": 1}, TEXT, "no text in column 'text'"),
        ({"text": "a"}, PAIR, "no text in column 'pair'"),
        ({"text": 12}, TEXT, "column 'text' holds 12"),
        ({"text": "a\ud800"}, TEXT, "column 'text' holds half a surrogate pair"),
    ],
)
def test_a_bad_text_is_named_with_file_and_row(row: dict[str, Any], columns: Columns, message: str) -> None:
    with pytest.raises(DataError, match=f"train.jsonl:8: {message}"):
        tokenise(rows_of({"text": "a", "pair": "a"}, row), columns, BERT, max_length=8, labels=None)


def test_text_that_gives_no_token_is_refused() -> None:
    bare = bert(models.BPE({"[PAD]": 0}, []))  # without an unknown token, what is unknown vanishes
    with pytest.raises(DataError, match=r"train\.jsonl:7: the tokenizer makes no token of this text"):
        tokenise(texts("zzz"), TEXT, bare, max_length=8, labels=None)


@pytest.mark.parametrize(("columns", "least"), [(TEXT, 3), (PAIR, 5)])
def test_a_limit_without_room_for_text_is_refused(columns: Columns, least: int) -> None:
    rows = rows_of({"text": "a b", "pair": "c d"})
    assert tokenise(rows, columns, BERT, max_length=least, labels=None).lengths == [least]
    with pytest.raises(SettingsError, match=rf"data.max_length {least - 1} .* {least}"):
        tokenise(rows, columns, BERT, max_length=least - 1, labels=None)
