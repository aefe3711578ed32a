"""Keep trusted rows apart from those that measure, and tokenise tables into samples on disk."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.compat.deepspeed import whole_shape
from tsqlora.data.batches import IGNORED
from tsqlora.data.generation import (
    input_of,
    left_out,
    require_room,
    require_some,
    require_tokens,
)
from tsqlora.data.labels import encode_labels, encode_targets
from tsqlora.data.rows import Columns, Row, row_hash, sample_hash, text_at, tokens_at
from tsqlora.data.splits import MEASURED
from tsqlora.data.table import Samples, Table, of_rows, store
from tsqlora.errors import DataError, SettingsError

Encode = Callable[..., Samples]
"""Takes rows, their format or columns, a tokenizer, `max_length`, and without a format the encoded `labels`."""


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


def prepare(
    tables: Mapping[str, Table],
    tokenizer: Any,
    *,
    max_length: int,
    encode: Encode,
    folder: Path | None = None,
    most: float = 0.0,
) -> dict[str, Table]:
    """Encode every split, with its labels; `tokenizer` is what `encode` makes samples with.

    Samples are stored on disk, as in `store`. A row whose target does not fit whole is left out with a note. So are
    those that cannot be read or rendered, up to the share `most`. Raises DataError with the first if there are more.
    """
    prepared, inputs = dict[str, Table](), dict[str, np.ndarray]()
    for name, table in tables.items():
        numbers, refused = list[int](), dict[int, DataError]()
        samples = store(_tokenised(table, tokenizer, max_length, encode, numbers, refused), folder)
        inputs[name] = np.array(numbers, dtype=np.uint64)
        notes = [*table.notes, *left_out(samples), *_refusals(table, refused, most)]
        if table.format is not None:
            require_some(samples, table.name, max_length)
        trained = np.isin(inputs[name], inputs.get("train", []), kind="sort")  # whatever the label
        if name in MEASURED and trained.any():
            notes.append(
                f"{trained.sum()} of {len(trained)} {name} rows are training rows too: their metrics say little about "
                "new rows"
            )
        prepared[name] = replace(table, samples=samples, ids=samples.ids, notes=tuple(notes))
    return prepared


def require_embedded(tables: Mapping[str, Table], tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Raises DataError naming the first row with a token that the model has no embedding for."""
    embeddings = whole_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) <= embeddings:
        return
    for table in tables.values():
        for row, sample in zip(table.samples.ids.tolist(), table.samples, strict=True):
            if (token := max(sample["input_ids"])) >= embeddings:
                raise DataError(
                    f"{table.name}: row {row} has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the "
                    f"model has {embeddings} embeddings; resize them to the tokenizer's {len(tokenizer)} tokens "
                    "(model.resize_token_embeddings) and train them, or give the model's own tokenizer"
                )


def _refusals(table: Table, refused: Mapping[int, DataError], most: float) -> list[str]:
    """A note of the rows that cannot be prepared, if there are any.  Raises DataError if they are too many."""
    if not refused:
        return []
    why, of = str(refused[min(refused)]), f"{len(refused):,} of {len(table):,} rows of {table.name}"
    if len(refused) > most * len(table) or len(refused) == len(table):
        raise DataError(f"{why}; so it is with {of}, more than data.max_bad_rows ({most:g}) leaves out")
    note = f"{of} are left out: {why}"
    warnings.warn(note, stacklevel=4)
    return [note]


def _tokenised(
    table: Table,
    tokenizer: Any,
    max_length: int,
    encode: Encode,
    inputs: list[int],
    refused: dict[int, DataError],
) -> Iterator[Samples]:
    """Encode a table chunk by chunk; append a number for the input of each sample to `inputs`."""
    column, classes = table.columns.label, table.classes
    for rows in table.chunks():
        if table.format is not None:
            part = encode(rows, table.format, tokenizer, max_length=max_length, refused=refused)
            inputs += (int(name, 16) for name in part.hashes)
        else:
            assert column is not None
            labels = encode_targets(rows, column) if classes is None else encode_labels(rows, column, classes)
            part = encode(rows, table.columns, tokenizer, max_length=max_length, labels=labels)
            inputs += (_input_number(row, table) for row in rows)
        yield part


def without_measured(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Drop trusted rows whose input a validation or test row has too; a note counts them.

    Raises DataError if no trusted row remains.
    """
    measured = [tables[name] for name in MEASURED if name in tables]
    if "trusted" not in tables or not measured:
        return dict(tables)
    trusted = tables["trusted"]
    own, others = (
        np.fromiter((_input_number(row, table) for table in some for row in table), dtype=np.uint64)
        for some in ([trusted], measured)
    )
    # By sorting: numpy 2.0's table overflows at hashes from 2⁶³ on.
    seen = np.isin(own, others, kind="sort")
    if not seen.any():
        return dict(tables)
    if seen.all():
        raise DataError(
            f"{trusted.name}: the inputs of all rows are also in validation or test rows, so no trusted row remains; "
            "name other rows in data.trusted, or others in data.validation and data.test"
        )
    note = f"{seen.sum()} of {len(seen)} trusted rows are left out: validation or test rows have the same input"
    return {**tables, "trusted": replace(trusted, ids=trusted.ids[~seen], notes=(*trusted.notes, note))}


def _input_number(row: Row, table: Table) -> int:
    """A number for a row's input, without its label: the text with its pair, or the prompt."""
    if table.format is not None:
        return int(sample_hash(input_of(row, table.format), "", ""), 16)
    return int(row_hash(row.cells, replace(table.columns, label=None)), 16)


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
