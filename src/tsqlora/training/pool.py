"""Select the rows of a pool to train on, as a `datasets.Dataset` for any trainer."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import nn

from tsqlora.auditing.draw.epochs import sample
from tsqlora.auditing.look import score
from tsqlora.auditing.scores import Scores
from tsqlora.auditing.texts.unfit import look_before, without_unfit
from tsqlora.auditing.texts.vocabulary import vocabulary_of_model
from tsqlora.errors import DataError, SettingsError, of_loaded_model
from tsqlora.model.load import positions_of
from tsqlora.model.request import Compute, RowNames, ScoringRule
from tsqlora.progress import bars
from tsqlora.rows.rows import MissingError, quoted
from tsqlora.rows.sources import of_dataset
from tsqlora.rows.splits import complete, prepare, require_columns, require_embedded
from tsqlora.rows.table import Table, notes_of
from tsqlora.settings.settings import DataSettings
from tsqlora.tasks import Task, task_of
from tsqlora.tasks.forward import base_model, continues


@of_loaded_model
def select(
    model: nn.Module,
    dataset: Any,
    *,
    processing_class: Any,
    trusted: Any = None,
    fraction: float = 0.5,
    seed: int = 0,
    rule: ScoringRule | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    drop: Literal["evident"] | None = None,
) -> Any:
    """The rows of a pool that are most like trusted rows, as a `datasets.Dataset` with the same columns.

    Texts are drawn by how much likelier they are among the trusted rows than in the pool, by their hidden states,
    preference pairs evenly. Call it before you build an SFTTrainer or DPOTrainer, and train on the result and the
    trusted rows. The model stays unchanged.

    Args:
        dataset: a `datasets.Dataset`, or a list of dicts: texts, prompts with completions, chats, prompts with
            chosen and rejected answers, or texts, images or recordings with labels.
        processing_class: the tokenizer, image processor or feature extractor.
        trusted: rows with the same columns, of the kind that the model must handle well; about 100 are enough.
        fraction: share of the pool's rows to return.
        batch_size: rows that the model reads at once.
        max_length: most tokens of a row; by default the model's own limit, at most 1,024. Of recordings most steps of
            20 ms; by default all.
        drop: "evident" leaves out texts whose answer belongs to another prompt, or is cut or in disorder, if there
            is evidence of such a fault, and says so. Of preference rows it leaves out those whose sides seem swapped,
            compared with most pairs. A fraction of 1 returns all others.

    Raises DataError for columns of no known format, SettingsError for a stream.
    """
    if drop not in (None, "evident"):
        raise SettingsError(f"drop is {drop!r}; give 'evident', or leave it out")
    pool = _as_dataset(dataset, "dataset")
    few = None if trusted is None else _as_dataset(trusted, "trusted")
    task = task_of(model, columns=pool.column_names)
    with tempfile.TemporaryDirectory() as folder:
        scores = score_pool(
            model,
            task.reading.by_path(pool, f"{folder}/pool"),
            None if few is None else task.reading.by_path(few, f"{folder}/trusted"),
            processing_class,
            task=task,
            rule=rule or ScoringRule(seed=seed),
            batch_size=batch_size,
            max_length=max_length,
            drop=drop == "evident",
        )
    why = (scores.record.gate or {}).get("why_not", "")
    chosen = fraction < 1 or few is not None  # else nobody asked for a choice by scores
    chosen = chosen and task.reading.why_even is None  # else `score` has warned
    if chosen and scores.even and (why or scores.kept.all()):
        even = "no score distinguishes the rows, so they are drawn evenly; give trusted rows"
        warnings.warn(str(why or even), stacklevel=3)
    share = min(fraction, float(scores.kept.mean())) if drop else fraction
    return pool.select(scores.row_ids[sample(scores, share, seed)])


def score_pool(
    model: nn.Module,
    pool: Any,
    trusted: Any,
    tokenizer: Any,
    *,
    task: Task,
    rule: ScoringRule,
    batch_size: int,
    max_length: int | None,
    drop: bool,
) -> Scores:
    """Score the rows of a `datasets.Dataset`; their ids are the positions in it."""
    rows = {"train": pool} | ({} if trusted is None else {"trusted": trusted})
    limit = task.reading.limit(max_length, tokenizer, positions_of(model), most=1024)
    tables, most = _tables(rows, model, task), DataSettings.model_fields["max_bad_rows"].default
    if tables["train"].format is not None:
        tables = {name: complete(table, most, tags=False) for name, table in tables.items()}
    warned = notes_of(tables)
    try:
        data = prepare(tables, tokenizer, max_length=limit, encode=task.reading.encode, most=most)
    except MissingError as error:
        for table in tables.values():
            require_columns(table, [error.what])
        raise
    require_embedded(data, tokenizer, model)
    for note in notes_of(data):
        if note not in warned:
            warnings.warn(note, stacklevel=4)
    samples = data["train"].samples
    compute = Compute(batch_size, progress=bars(len(samples)))
    scores = score(
        model,
        samples,
        task.reading.collate(model, tokenizer, max_length=limit),
        rule=rule,
        task=task,
        rows=RowNames(samples.ids, samples.hashes, samples.lengths),
        compute=compute,
        trusted=data["trusted"].samples if "trusted" in data else None,
    )
    if not drop:
        return scores
    if not continues(base_model(model)):
        raise SettingsError(f"drop='evident' judges answers that a causal model writes; the task is {task.name}")
    about = (tokenizer, cast(Any, model).config, cast(Any, model).generation_config)
    look = look_before(model, samples, vocabulary_of_model(*about, size_of=model), compute, seed=rule.seed)
    for sentence in look.sentences():
        warnings.warn(sentence, stacklevel=4)
    return without_unfit(scores, look)


def _as_dataset(rows: Any, name: str) -> Any:
    from datasets import Dataset  # seconds to import

    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)  # `from_list` takes those of the first row
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    raise SettingsError(
        f"{name} is a {type(rows).__name__}; give a datasets.Dataset with rows, or a list of dicts (of a stream, the "
        "rows that fit: datasets.Dataset.from_list(list(stream.take(n))))"
    )


def _tables(rows: Mapping[str, Any], model: nn.Module, task: Task) -> dict[str, Table]:
    """The pool and the trusted rows as tables, with the format or the columns of the pool."""
    pool = rows["train"]
    # A model's own classes have numbers, and other names.
    tables = {
        split: of_dataset(part, "dataset" if split == "train" else split).numbered() for split, part in rows.items()
    }
    names = list(pool.column_names)
    try:
        columns, format = task.reading.find(names, source="dataset")
        if columns.label is None and format is None:
            raise DataError("dataset has no label column")
    except DataError as error:  # settings, which others name, this function has none of
        renamed = ", ".join(f"{old!r}: {new!r}" for old, new in zip(names, task.reading.usual, strict=False))
        raise DataError(
            f"{str(error).partition('; ')[0]}; rename its columns {quoted(names)}, such as "
            f"dataset.rename_columns({{{renamed}}})"
        ) from error
    classes = None if columns.label is None else task.reading.classes_of(cast(Any, model).config, pool[columns.label])
    return {split: table.using(columns, classes, format) for split, table in tables.items()}
