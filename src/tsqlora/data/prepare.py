"""Tokenise splits into samples on disk, and keep trusted rows apart from those that measure."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.cells import row_hash, sample_hash
from tsqlora.data.formats import PREFERENCE
from tsqlora.data.generation import inputs, left_out, require_some, tokenise_generation, tokenise_pairs
from tsqlora.data.labels import encode_labels, encode_targets
from tsqlora.data.rows import Rows
from tsqlora.data.samples import TokenisedSplit, store
from tsqlora.data.splits import MEASURED, Splits
from tsqlora.data.tokenise import encoder
from tsqlora.errors import DataError, SettingsError


@dataclass(frozen=True, slots=True)
class Prepared:
    """Splits with their tokenised samples; `notes` list rows that were left out, and rows in two splits."""

    splits: Splits
    samples: Mapping[str, TokenisedSplit]
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """16 hex digits that identify the data: a hash of every sample of every split, in order."""
        digest, between = hashlib.sha256(), ""
        for name, split in self.samples.items():
            for h in split.hashes:
                digest.update(f"{between}{name}:{h}".encode())
                between = "\n"
        return digest.hexdigest()[:16]

    def columns(self) -> dict[str, str | None]:
        """Names of the columns in use, as the run's record and the scores store them."""
        return asdict(self.splits.columns)


def prepare(
    splits: Splits,
    tokenizer: Any,
    *,
    max_length: int,
    seq2seq: bool = False,
    folder: Path | None = None,
) -> Prepared:
    """Tokenise every split, with encoded labels; rows of texts for a causal model, or for a `seq2seq` one.

    Images and recordings stay in their files, and `tokenizer` is the processor that reads them. Rows are read in
    chunks and samples stored on disk, as in `store`. A row whose target does not fit whole is left
    out with a note; so is a trusted row that shares its input with validation or test rows.
    Raises DataError if no trusted row remains.
    """
    splits, notes_of_trusted = _without_measured(splits)
    samples, texts = dict[str, TokenisedSplit](), dict[str, np.ndarray]()
    for name in splits.sources:
        numbers = list[np.ndarray]()
        samples[name] = store(_tokenised(splits, name, tokenizer, max_length, seq2seq, numbers), folder)
        texts[name] = np.concatenate(numbers)
        if splits.format is not None:
            require_some(samples[name], splits.sources[name].name, max_length)
    places = {name: split.ids for name, split in samples.items() if split.ids is not None}
    splits = replace(splits, places=places)
    notes = [note for split in samples.values() if (note := left_out(split))]
    return Prepared(splits, samples, (*splits.notes, *notes, *notes_of_trusted, *_in_training_too(texts)))


def _tokenised(
    splits: Splits,
    name: str,
    tokenizer: Any,
    max_length: int,
    seq2seq: bool,
    texts: list[np.ndarray],
) -> Iterator[TokenisedSplit]:
    """Tokenise a split chunk by chunk; append a number for the text of each sample to `texts`."""
    for rows in splits.chunks(name):
        if splits.format is not None:
            if splits.format.name == PREFERENCE:
                part = tokenise_pairs(rows, splits.format, tokenizer, max_length=max_length)
            else:
                part = tokenise_generation(rows, splits.format, tokenizer, max_length=max_length, seq2seq=seq2seq)
            texts.append(_as_numbers(part.hashes))
        else:
            by_word = splits.labels is not None and splits.labels.answer == "tags"
            encode = encoder(splits.columns, by_word=by_word)
            part = encode(rows, splits.columns, tokenizer, max_length=max_length, labels=_labels(rows, splits))
            texts.append(_input_numbers(rows, splits))
        yield part


def _labels(rows: Rows, splits: Splits) -> list[Any]:
    column = splits.columns.label
    assert column is not None
    return encode_targets(rows, column) if splits.labels is None else encode_labels(rows, column, splits.labels)


def _in_training_too(texts: Mapping[str, np.ndarray]) -> list[str]:
    """Notes about validation and test rows whose text is also in the training rows, whatever the label."""
    if "train" not in texts:
        return []
    seen = {name: int(np.isin(texts[name], texts["train"], kind="sort").sum()) for name in MEASURED if name in texts}
    return [
        f"{count} of {len(texts[name])} {name} rows are training rows too: their metrics say little about new rows"
        for name, count in seen.items()
        if count
    ]


def _without_measured(splits: Splits) -> tuple[Splits, tuple[str, ...]]:
    """Drop trusted rows whose input a validation or test row has too; a note counts them."""
    measured = [_inputs_of(splits, name) for name in MEASURED if name in splits.sources]
    if "trusted" not in splits.sources or not measured:
        return splits, ()
    # By sorting: numpy 2.0's table overflows at hashes from 2⁶³ on.
    seen = np.isin(_inputs_of(splits, "trusted"), np.concatenate(measured), kind="sort")
    if not seen.any():
        return splits, ()
    if seen.all():
        raise DataError(
            f"{splits.sources['trusted'].name}: the inputs of all rows are also in validation or test rows, so no "
            "trusted row remains; name other rows in data.trusted, or others in data.validation and data.test"
        )
    note = f"{seen.sum()} of {len(seen)} trusted rows are left out: validation or test rows have the same input"
    return replace(splits, places={**splits.places, "trusted": splits.places["trusted"][~seen]}), (note,)


def _inputs_of(splits: Splits, name: str) -> np.ndarray:
    return np.concatenate([_input_numbers(rows, splits) for rows in splits.chunks(name)])


def _input_numbers(rows: Rows, splits: Splits) -> np.ndarray:
    """A number for each row's input, without its label: the text with its pair, or the prompt."""
    if splits.format is not None:
        return _as_numbers(sample_hash(text, "", "") for text in inputs(rows, splits.format))
    unlabelled = asdict(splits.columns) | {"label": None}
    return _as_numbers(row_hash(row, unlabelled) for row in rows.rows)


def _as_numbers(hashes: Iterable[str]) -> np.ndarray:
    return np.array([int(name, 16) for name in hashes], dtype=np.uint64)


def resolve_max_length(setting: int | None, *, tokenizer_limit: int, positions: int | None) -> int:
    """Tokens of a sample: the setting, else the lesser of the tokenizer's and the model's limit.

    Raises SettingsError if the setting exceeds the model's positions, and if neither names a limit.
    """
    limits = [limit for limit in (positions, tokenizer_limit) if limit is not None and limit < 10**9]
    if setting is None:
        if not limits:
            raise SettingsError("neither the model nor its tokenizer has a maximal length; set data.max_length")
        return min(limits)
    if positions is not None and setting > positions:
        raise SettingsError(f"data.max_length {setting} is above the model's {positions} positions; lower it")
    return setting
