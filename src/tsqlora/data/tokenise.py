"""Tokenise rows of texts with one answer each."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora.data.cells import row_hash, text_at
from tsqlora.data.columns import Columns
from tsqlora.data.rows import Rows
from tsqlora.data.samples import TokenisedSplit
from tsqlora.errors import DataError, SettingsError


def tokenise(
    rows: Rows,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[Any] | None,
) -> TokenisedSplit:
    """One sample a row, of at most `max_length` tokens, not padded; `labels` are encoded, or None.

    Raises DataError with file and row for a text that is missing or not text, SettingsError if `max_length`
    leaves no room for text.
    """
    pair = columns.text_pair
    require_room(max_length, tokenizer.num_special_tokens_to_add(pair=pair is not None), 1 if pair is None else 2)
    texts = [text_at(rows, i, columns.text) for i in range(len(rows))]
    pairs = None if pair is None else [text_at(rows, i, pair) for i in range(len(rows))]
    samples = _call(tokenizer, texts, pairs, max_length=None)
    long = [i for i, sample in enumerate(samples) if len(sample["input_ids"]) > max_length]
    if long:  # only these are tokenised twice
        long_pairs = None if pairs is None else [pairs[i] for i in long]
        cut = _call(tokenizer, [texts[i] for i in long], long_pairs, max_length=max_length)
        for i, sample in zip(long, cut, strict=True):
            samples[i] = sample
    for i, sample in enumerate(samples):
        require_tokens(sample["input_ids"], rows.place(i))
    if labels is not None:
        samples = [{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)]
    used = asdict(columns)
    return TokenisedSplit(samples, tuple(row_hash(row, used) for row in rows.rows), len(long), rows.ids)


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
