"""Files of any size -> samples on disk: as `prepare`, and never all rows in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.data.cells import row_text
from tsqlora.data.columns import Columns, find_columns
from tsqlora.data.formats import Format, find_format
from tsqlora.data.generation import kept_of_targets
from tsqlora.data.labels import LabelMap, classes_of, distinct_labels, encode_targets
from tsqlora.data.prepare import Prepared, Splits, Writing, encode_split, fit_whole
from tsqlora.data.rows import Rows, Source, column_names, open_splits
from tsqlora.data.split import held_out, take
from tsqlora.data.stored import store_samples
from tsqlora.data.tokenise import TokenisedSplit
from tsqlora.errors import DataError


@dataclass(frozen=True, slots=True)
class Survey:
    """What passes over the training rows say of them; `places` are those of each split in its source."""

    sources: Mapping[str, Source]
    places: Mapping[str, np.ndarray]
    columns: Columns
    labels: LabelMap | None
    format: Format | None = None


def survey_data(
    train: str,
    validation: str | None,
    test: str | None,
    *,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    classes: bool,
    validation_fraction: float,
    seed: int,
) -> Survey:
    """What `read_data` finds, the same rows in the same splits; the test rows are not read.

    Raises DataError as `read_data`.
    """
    sources = open_splits(train, validation, test)
    first = sources["train"]
    names = column_names_of(first)
    columns = find_columns(names, text=text, text_pair=text_pair, label=label, source=first.name)
    if columns.label is None:
        raise DataError(f"{first.name} has no label column; name it in data.label. Columns: {', '.join(names)}")
    label_map, groups = _labels(first, columns.label, classes=classes)
    places = _places(sources, groups, fraction=validation_fraction, seed=seed)
    return Survey({name: sources[name] for name in places}, places, columns, label_map)


def survey_texts(
    train: str,
    validation: str | None,
    test: str | None,
    *,
    format: str | None,
    prompt: str | None,
    target: str | None,
    messages: str | None,
    text: str | None,
    validation_fraction: float,
    seed: int,
) -> Survey:
    """What `read_texts` finds, the same rows in the same splits."""
    sources = open_splits(train, validation, test)
    first = sources["train"]
    found = find_format(
        column_names_of(first),
        source=first.name,
        format=format,
        prompt=prompt,
        target=target,
        messages=messages,
        text=text,
    )
    groups = np.zeros(sum(map(len, first.chunks())), dtype=np.int64)
    places = _places(sources, groups, fraction=validation_fraction, seed=seed)
    return Survey({name: sources[name] for name in places}, places, found.columns, None, found)


def survey_whole(train: str, columns: Columns, labels: LabelMap | None, format: Format | None) -> Survey:
    """All rows of a file, none held out, by columns, classes and a format that are known."""
    source = open_splits(train, None, None)["train"]
    return Survey({"train": source}, {"train": np.arange(sum(map(len, source.chunks())))}, columns, labels, format)


def _places(sources: dict[str, Source], groups: np.ndarray, *, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Where the rows of each split are in its source; a validation split that is not there is taken from the first."""
    if "validation" in sources:
        return {
            "train": np.arange(len(groups)),
            "validation": np.arange(sum(map(len, sources["validation"].chunks()))),
        }
    out = held_out(groups, fraction=fraction, seed=seed, source=sources["train"].name)
    sources["validation"] = sources["train"]
    return {"train": np.flatnonzero(~out), "validation": np.flatnonzero(out)}


def count_held_out(survey: Survey) -> int:
    """Rows of the training file that are its validation split."""
    sources = survey.sources
    return len(survey.places["validation"]) if sources.get("validation") is sources["train"] else 0


def with_whole_targets(
    survey: Survey, tokenizer: PreTrainedTokenizerBase, *, max_length: int, writing: Writing | None
) -> tuple[Survey, list[str]]:
    """Without the rows whose target does not fit, which `prepare` leaves out as well; and a note for each split.

    Raises DataError where none fits.
    """
    if writing is None:
        return survey, []
    splits, places, notes = Splits({}, survey.columns, None, survey.format), dict[str, np.ndarray](), list[str]()
    for name, known in survey.places.items():
        source, kept, before = survey.sources[name], list[np.ndarray](), 0
        for rows in _chunks_of(source, known):
            kept.append(before + fit_whole(rows, splits, tokenizer, max_length, writing, may_be_none=True))
            before += len(rows)
        places[name] = known[np.concatenate(kept)]
        if not len(places[name]):
            most, setting = kept_of_targets(max_length, writing.max_target_length, seq2seq=writing.seq2seq)
            raise DataError(f"{source.name}: no target fits whole into {most} tokens; raise {setting}")
        if out := len(known) - len(places[name]):
            notes.append(f"{out} of {len(known)} {name} rows are left out, whose targets do not fit whole")
    return replace(survey, places=places), notes


def store(
    survey: Survey,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_length: int,
    writing: Writing | None = None,
) -> Prepared:
    """Every split tokenised into a file of the folder."""
    splits = Splits({}, survey.columns, survey.labels, survey.format)
    samples = {name: _stored(survey, splits, name, tokenizer, folder, max_length, writing) for name in survey.places}
    return Prepared(splits, samples)


def texts_of(survey: Survey, split: str) -> Iterator[str]:
    """The text of every row of a split, in order: a line for each of a pair's two, and for what is to be written."""
    columns = asdict(survey.columns)
    written = survey.columns.label if survey.format is not None else None
    for rows in _chunks_of(survey.sources[split], survey.places[split]):
        for row in rows.rows:
            yield row_text(row, columns) + ("" if written is None else f"\n{row.get(written)}")


def column_names_of(source: Source) -> tuple[str, ...]:
    """Every column that some row has, in the order of first appearance."""
    return tuple(dict.fromkeys(name for chunk in source.chunks() for name in column_names(chunk)))


def _labels(source: Source, column: str, *, classes: bool) -> tuple[LabelMap | None, np.ndarray]:
    """The classes, and the number of each row's; all rows alike where labels are numbers."""
    if classes:
        labels, groups = distinct_labels(source.chunks(), column)
        return classes_of(labels, source.name, column), groups
    return None, np.zeros(sum(len(encode_targets(chunk, column)) for chunk in source.chunks()), dtype=np.int64)


def _stored(
    survey: Survey,
    splits: Splits,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_length: int,
    writing: Writing | None,
) -> TokenisedSplit:
    hashes: list[str] = []
    truncated = 0

    def parts() -> Iterator[list[dict]]:
        nonlocal truncated
        for rows in _chunks_of(survey.sources[name], survey.places[name]):
            part = encode_split(rows, splits, tokenizer, max_length=max_length, writing=writing)
            hashes.extend(part.hashes)
            truncated += part.truncated
            yield list(part.samples)

    samples = store_samples(parts(), folder / f"{name}.tokens")
    return TokenisedSplit(samples, tuple(hashes), truncated, survey.places[name])


def _chunks_of(source: Source, places: np.ndarray) -> Iterator[Rows]:
    """The rows at these places, which ascend, chunk by chunk."""
    start = 0
    for chunk in source.chunks():
        low, high = np.searchsorted(places, [start, start + len(chunk)])
        if low < high:
            yield take(chunk, places[low:high] - start)
        start += len(chunk)
