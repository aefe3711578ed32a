"""Tokenise rows of texts with one answer each, and rows of tokens with a tag each."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora.data.batches import IGNORED
from tsqlora.data.cells import Row, text_at, tokens_at
from tsqlora.data.columns import Columns
from tsqlora.data.media import encode_files
from tsqlora.data.table import Samples, of_rows
from tsqlora.errors import DataError, SettingsError


def tokenise(
    rows: Sequence[Row],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[Any] | None,
) -> Samples:
    """One sample a row, of at most `max_length` tokens, not padded; `labels` are encoded, or None.

    Raises DataError with file and row for a text that is missing or not text, SettingsError if `max_length`
    leaves no room for text.
    """
    pair = columns.text_pair
    require_room(max_length, tokenizer.num_special_tokens_to_add(pair=pair is not None), 1 if pair is None else 2)
    texts = [text_at(row, columns.text) for row in rows]
    pairs = None if pair is None else [text_at(row, pair) for row in rows]
    samples = _call(tokenizer, texts, pairs, max_length=None)
    long = [i for i, sample in enumerate(samples) if len(sample["input_ids"]) > max_length]
    if long:  # only these are tokenised twice
        long_pairs = None if pairs is None else [pairs[i] for i in long]
        cut = _call(tokenizer, [texts[i] for i in long], long_pairs, max_length=max_length)
        for i, sample in zip(long, cut, strict=True):
            samples[i] = sample
    for row, sample in zip(rows, samples, strict=True):
        require_tokens(sample["input_ids"], row.place)
    if labels is not None:
        samples = [{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)]
    return of_rows(samples, rows, columns, truncated=len(long))


def tokenise_words(
    rows: Sequence[Row],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[Sequence[int]] | None,
) -> Samples:
    """One sample a row of tokens; the first piece of each has its tag as label, every other place -100.

    Without `labels` the first piece has the number of its token. A token behind the cut has no piece, and is counted.
    Raises DataError with file and row, SettingsError for a tokenizer that does not say which pieces a token has.
    """
    require_room(max_length, tokenizer.num_special_tokens_to_add(), 1)
    if not tokenizer.is_fast:
        raise SettingsError("token classification needs a fast tokenizer (tokenizer.json); give another model")
    samples, truncated, cut = list[dict[str, Any]](), 0, 0
    for i, row in enumerate(rows):
        words = tokens_at(row, columns.text)
        tags = range(len(words)) if labels is None else labels[i]
        whole = tokenizer(words, is_split_into_words=True, verbose=False)
        part = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False)
        own = [-1 if j is None else j for j in part.word_ids()]
        require_tokens([j for j in own if j >= 0], row.place)
        first = [j >= 0 and j != before for before, j in zip([-1, *own], own, strict=False)]
        truncated += len(part["input_ids"]) < len(whole["input_ids"])
        cut += len({j for j in whole.word_ids() if j is not None} - set(own))
        targets = [tags[j] if begins else IGNORED for j, begins in zip(own, first, strict=True)]
        samples.append({**{key: list(values) for key, values in part.items()}, "labels": targets})
    return of_rows(samples, rows, columns, truncated=truncated, cut_words=cut)


def encoder(columns: Columns, *, by_word: bool) -> Callable[..., Samples]:
    """The function that makes samples of rows: files, tokens with tags, or texts."""
    return encode_files if columns.media else tokenise_words if by_word else tokenise


def require_room(max_length: int, special: int, texts: int) -> None:
    """Raises SettingsError if special tokens leave no room for a token of each text."""
    if max_length < special + texts:
        raise SettingsError(
            f"data.max_length {max_length} leaves no room for text beside {special} special tokens; "
            f"set it to {special + texts} or more"
        )


def require_tokens(ids: Sequence[int], place: str) -> None:
    """Raises DataError with the place for a text without any token."""
    if not ids:
        raise DataError(f"{place}: the tokenizer makes no token of this text; remove the row")


def _call(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, *, max_length: int | None
) -> list[dict[str, Any]]:
    encoded = tokenizer(
        texts,
        pairs,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=True,
        verbose=False,  # long texts are counted, not warned about
    )
    return [{key: values[i] for key, values in encoded.items()} for i in range(len(texts))]
