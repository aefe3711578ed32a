import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from tables import rows_of
from tsqlora.data.rows import Columns, Row
from tsqlora.data.tokens import tokenise
from tsqlora.errors import DataError, SettingsError

TEXT, PAIR = Columns("text", None, "label"), Columns("text", "pair", "label")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d")
PAD, UNK, CLS, SEP, A, B, C, D = range(len(WORDS))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))  # pyright: ignore[reportAttributeAccessIssue]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_max_length=6, model_input_names=names
    )


def texts(*values: Any) -> list[Row]:
    return rows_of(*({"text": value, "label": "x"} for value in values))


def error(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], columns: Columns = TEXT) -> str:
    with pytest.raises(DataError) as caught:
        tokenise(rows, columns, tokenizer, max_length=8, labels=None)
    return str(caught.value)


def test_samples_are_what_a_model_takes(tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenise(texts("a b", "c"), TEXT, tokenizer, max_length=8, labels=[1, 0])
    assert split[0] == {
        "input_ids": [CLS, A, B, SEP],
        "token_type_ids": [0, 0, 0, 0],
        "attention_mask": [1, 1, 1, 1],
        "labels": 1,
    }
    assert (len(split), split.lengths, split.truncated) == (2, [4, 3], 0)


def test_a_pair_is_one_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenise(rows_of({"text": "a", "pair": "b"}), PAIR, tokenizer, max_length=8, labels=None)
    assert split[0]["input_ids"] == [CLS, A, SEP, B, SEP]
    assert split[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert "labels" not in split[0]


def test_token_types_are_left_out_where_the_tokenizer_makes_none() -> None:
    inner = Tokenizer(models.BPE({"[PAD]": 0, "a": 1}, []))
    bare = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    split = tokenise(texts("a"), TEXT, bare, max_length=8, labels=None)
    assert split[0] == {"input_ids": [1], "attention_mask": [1]}


def test_only_what_is_longer_than_the_limit_is_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenise(texts("a b", "a b c d", "a b c"), TEXT, tokenizer, max_length=5, labels=None)
    assert [sample["input_ids"] for sample in split] == [
        [CLS, A, B, SEP],
        [CLS, A, B, C, SEP],
        [CLS, A, B, C, SEP],
    ]
    assert split.truncated == 1


def test_of_a_pair_the_longer_text_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of({"text": "a b c d", "pair": "d"}, {"text": "a", "pair": "b"})
    split = tokenise(rows, PAIR, tokenizer, max_length=5, labels=None)
    assert split[0]["input_ids"] == [CLS, A, SEP, D, SEP]
    assert split.truncated == 1


def test_a_sample_does_not_depend_on_its_neighbours(tokenizer: PreTrainedTokenizerFast) -> None:
    together = tokenise(texts("a b c d", "c"), TEXT, tokenizer, max_length=4, labels=None)
    for i, text in enumerate(("a b c d", "c")):
        alone = tokenise(texts(text), TEXT, tokenizer, max_length=4, labels=None)
        assert (alone[0], alone.hashes[0]) == (together[i], together.hashes[i])


def test_long_text_is_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})  # it warns only once
    tokenise(texts("a b c d a b c d"), TEXT, tokenizer, max_length=6, labels=None)
    assert not caplog.records


def test_a_hash_is_of_text_pair_and_label_as_written(tokenizer: PreTrainedTokenizerFast) -> None:
    cells = ({"pair": "b", "label": 3}, {"pair": "b"}, {"pair": "b c"}, {"pair": "b", "label": "d"})
    split = tokenise(rows_of(*({"text": "a"} | row for row in cells)), PAIR, tokenizer, max_length=8, labels=None)
    expected = [b"a\x1fb\x1f3", b"a\x1fb\x1f", b"a\x1fb c\x1f", b"a\x1fb\x1fd"]
    assert split.hashes == tuple(hashlib.sha256(data).hexdigest()[:16] for data in expected)


def test_a_split_is_a_torch_data_set(tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenise(texts("a b", "c", "d"), TEXT, tokenizer, max_length=8, labels=[0.5, 1.0, 0.0])
    loader: DataLoader[Any] = DataLoader(split, 2, collate_fn=DataCollatorWithPadding(tokenizer))  # pyright: ignore[reportArgumentType]
    batches = list(loader)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (1, 3)]
    assert batches[0]["labels"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        *(({"text": missing}, TEXT, "no text in column 'text'") for missing in (None, "", " \n", math.nan)),
        ({"label": 1}, TEXT, "no text in column 'text'"),
        ({"text": "a"}, PAIR, "no text in column 'pair'"),
        ({"text": 12}, TEXT, "column 'text' holds int 12"),
        ({"text": "a\ud800"}, TEXT, "column 'text' holds half a surrogate pair"),
    ],
)
def test_a_bad_text_is_named_with_file_and_row(
    row: dict[str, Any], columns: Columns, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert f"train.jsonl:8: {message}" in error(tokenizer, rows_of({"text": "a", "pair": "a"}, row), columns)


def test_text_that_gives_no_token_is_refused() -> None:
    inner = Tokenizer(models.BPE({"[PAD]": 0}, []))  # without an unknown token, what is unknown vanishes
    bare = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    assert "train.jsonl:7: the tokenizer makes no token of this text" in error(bare, texts("zzz"))


@pytest.mark.parametrize(("columns", "least"), [(TEXT, 3), (PAIR, 5)])
def test_a_limit_without_room_for_text_is_refused(
    tokenizer: PreTrainedTokenizerFast, columns: Columns, least: int
) -> None:
    rows = rows_of({"text": "a b", "pair": "c d"})
    assert tokenise(rows, columns, tokenizer, max_length=least, labels=None).lengths == [least]
    with pytest.raises(SettingsError, match=rf"data.max_length {least - 1} .* {least}"):
        tokenise(rows, columns, tokenizer, max_length=least - 1, labels=None)
