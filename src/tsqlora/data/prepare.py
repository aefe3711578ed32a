"""Splits -> samples on disk, with what was cut and left out on the way."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.data.generation import left_out, require_some, tokenise_generation
from tsqlora.data.labels import encode_labels, encode_targets
from tsqlora.data.rows import Rows
from tsqlora.data.samples import TokenisedSplit, store
from tsqlora.data.splits import MEASURED, Splits
from tsqlora.data.tokenise import tokenise
from tsqlora.data.trusted import apart, input_numbers, numbers_of
from tsqlora.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Writing:
    """How a generating model takes its samples: the target on a side of its own, or on the prompt's heels."""

    seq2seq: bool
    max_target_length: int | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Splits as a model takes them."""

    splits: Splits
    samples: Mapping[str, TokenisedSplit]
    notes: tuple[str, ...] = ()
    """What the user should know: rows that were left out, and rows that are in two splits."""

    @property
    def hash(self) -> str:
        """16 hex digits that name the data: of every sample of every split, in order."""
        digest, between = hashlib.sha256(), ""
        for name, split in self.samples.items():
            for h in split.hashes:
                digest.update(f"{between}{name}:{h}".encode())
                between = "\n"
        return digest.hexdigest()[:16]

    def columns(self) -> dict[str, str | None]:
        """Names of the columns used, as the run's record and the scores keep them."""
        return asdict(self.splits.columns)


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    writing: Writing | None = None,
    folder: Path | None = None,
) -> Prepared:
    """Every split tokenised, with encoded labels; for a generating model with targets.

    Rows are read in chunks and samples kept on disk, as in `store`. A row whose target does not fit whole is left out
    of splits and samples, and a note says so; so is a trusted row whose input validation or test has, too.
    Raises DataError where no trusted row is left.
    """
    splits, measured_too = apart(splits)
    samples, texts = dict[str, TokenisedSplit](), dict[str, np.ndarray]()
    for name in splits.sources:
        found = list[np.ndarray]()
        samples[name] = store(_encoded(splits, name, tokenizer, max_length, writing, found), folder)
        texts[name] = np.concatenate(found)
        if writing is not None:
            require_some(
                samples[name], splits.sources[name].name, max_length, writing.max_target_length, writing.seq2seq
            )
    places = {name: split.ids for name, split in samples.items() if split.ids is not None}
    splits = replace(splits, places=places)
    notes = [note for split in samples.values() if (note := left_out(split))]
    return Prepared(splits, samples, (*splits.notes, *notes, *measured_too, *_seen_in_training(texts)))


def _encoded(
    splits: Splits,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    writing: Writing | None,
    texts: list[np.ndarray],
) -> Iterator[TokenisedSplit]:
    """The split chunk by chunk; a number for the text of each sample is put into `texts`."""
    for rows in splits.chunks(name):
        part = _encode(rows, splits, tokenizer, max_length, writing)
        texts.append(numbers_of(part.hashes) if splits.format is not None else input_numbers(rows, splits))
        yield part


def _seen_in_training(texts: Mapping[str, np.ndarray]) -> list[str]:
    """Rows to measure on that training has, too: of classes and numbers by the text, whatever the label is."""
    if "train" not in texts:
        return []
    seen = {name: int(np.isin(texts[name], texts["train"]).sum()) for name in MEASURED if name in texts}
    return [
        f"{count} of {len(texts[name])} {name} rows are training rows, too: what is measured on them says little of "
        "new ones"
        for name, count in seen.items()
        if count
    ]


def _encode(
    rows: Rows, splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int, writing: Writing | None
) -> TokenisedSplit:
    """Rows as samples in memory."""
    if splits.format is None or writing is None:
        labels = _labels(rows, splits)
        return tokenise(rows, splits.columns, tokenizer, max_length=max_length, labels=labels)
    return tokenise_generation(
        rows,
        splits.format,
        tokenizer,
        max_length=max_length,
        seq2seq=writing.seq2seq,
        max_target_length=writing.max_target_length,
    )


def _labels(rows: Rows, splits: Splits) -> list[int] | list[float]:
    column = splits.columns.label
    assert column is not None
    return encode_targets(rows, column) if splits.labels is None else encode_labels(rows, column, splits.labels)


def resolve_max_length(asked: int | None, *, tokenizer_limit: int, positions: int | None) -> int:
    """Tokens kept of a sample: what is asked, else the lesser of the tokenizer's and the model's limit.

    Raises SettingsError where more is asked than the model has positions, or nothing is known.
    """
    limits = [limit for limit in (positions, tokenizer_limit) if limit is not None and limit < 10**9]
    if asked is None:
        if not limits:
            raise SettingsError("neither the model nor its tokenizer names a maximal length; set data.max_length")
        return min(limits)
    if positions is not None and asked > positions:
        raise SettingsError(f"data.max_length {asked} is above the model's {positions} positions; lower it")
    return asked
