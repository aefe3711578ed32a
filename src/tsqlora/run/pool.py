"""Select the rows of a pool to train on, as a `datasets.Dataset` for any trainer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from tsqlora.data.columns import find_columns
from tsqlora.data.formats import find_format
from tsqlora.data.labels import LabelMap, split_labels
from tsqlora.data.prepare import prepare, resolve_max_length
from tsqlora.data.rows import Source, of_dataset
from tsqlora.data.splits import Splits
from tsqlora.errors import DataError, SettingsError
from tsqlora.quality.epochs import sample
from tsqlora.quality.rule import Compute, RowNames, ScoringRule
from tsqlora.quality.score import score
from tsqlora.quality.subset import equals
from tsqlora.quality.trusted import Trusted
from tsqlora.tasks import Task
from tsqlora.tasks.forward import task_of
from tsqlora.tasks.generation import Generation
from tsqlora.training.load import collate_of, positions_of


def select(
    model: nn.Module,
    dataset: Any,
    *,
    processing_class: PreTrainedTokenizerBase,
    trusted: Any = None,
    fraction: float = 0.5,
    seed: int = 0,
    rule: ScoringRule | None = None,
    learning_rate: float = 5e-4,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Any:
    """The share of a pool that teaches a model what trusted rows show, as a `datasets.Dataset` with the same columns.

    Text is drawn by reducible loss: rows that a model trained on the trusted rows alone predicts better than this model
    does. Call it before you build an SFTTrainer or DPOTrainer, train on the result, then once more on the trusted
    rows. The model stays unchanged; one with an adapter (`get_peft_model`, `tsqlora.wrap`) is faster, since only the
    adapter learns the trusted rows.

    Args:
        dataset: a `datasets.Dataset`, or a list of dicts: texts, prompts with completions, chats, chosen with rejected
            answers (the chosen ones count), or texts with labels.
        trusted: rows with the same columns, of the kind that the model must handle well; 32 to 200 are enough.
        fraction: share of the pool's rows to return.
        learning_rate, batch_size: of the later training; the trusted model gets twice that rate.
        max_length: most tokens of a row; by default the model's own limit, at most 1,024.

    Raises DataError for columns of no known format, SettingsError for a stream.
    """
    pool = _as_dataset(dataset, "dataset")
    rows = {"train": pool} | ({} if trusted is None else {"trusted": _as_dataset(trusted, "trusted")})
    task = task_of(model)
    most = min(processing_class.model_max_length, 1024)
    limit = resolve_max_length(max_length, tokenizer_limit=most, positions=positions_of(model))
    seq2seq = isinstance(task, Generation) and not task.causal
    data = prepare(_splits(rows, model, task), processing_class, max_length=limit, seq2seq=seq2seq)
    for note in data.notes:
        warnings.warn(note, stacklevel=2)
    samples, reference = data.samples["train"], None
    if "trusted" in data.samples:
        own = data.samples["trusted"]
        reference = Trusted(own, learning_rate, batch_size, twins=equals(samples, own))
    scores = score(
        model,
        samples,
        collate_of(task, model, processing_class, max_length=limit),
        rule=rule or ScoringRule(seed=seed),
        task=task,
        rows=RowNames(samples.ids, samples.hashes, samples.lengths),
        compute=Compute(batch_size),
        trusted=reference,
    )
    if scores.even and scores.kept.all():
        warnings.warn("no score distinguishes the rows, so they are drawn evenly; give trusted rows", stacklevel=2)
    assert samples.ids is not None
    return pool.select(samples.ids[sample(scores, fraction, seed)])


def _as_dataset(rows: Any, name: str) -> Any:
    from datasets import Dataset  # seconds to import

    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        return Dataset.from_list([dict(row) for row in rows])
    raise SettingsError(
        f"{name} is a {type(rows).__name__}; give a datasets.Dataset with rows, or a list of dicts (of a stream, the "
        "rows that fit: datasets.Dataset.from_list(list(stream.take(n))))"
    )


def _splits(rows: Mapping[str, Any], model: nn.Module, task: Task) -> Splits:
    """The pool and the trusted rows as splits, with the format or the columns of the pool."""
    pool = rows["train"]
    names, places = list(pool.column_names), {split: np.arange(len(part)) for split, part in rows.items()}
    if isinstance(task, Generation):
        preferences = {"chosen", "rejected"} <= {*names}
        if preferences:
            names = ["messages"] if isinstance(pool[0]["chosen"], list) else ["prompt", "completion"]
        format = find_format(names, source="dataset")
        sources = {split: _source(part, split, preferences=preferences) for split, part in rows.items()}
        return Splits(sources, places, format.columns, None, format)
    columns, labels = find_columns(names, text=None, text_pair=None, label=None, source="dataset"), None
    if columns.label is None:
        raise DataError(f"dataset has no label column; its columns are {', '.join(names)}")
    if task.answer in ("class", "labels"):
        classes = cast(Any, model).config.id2label
        first = split_labels(next((cell for cell in pool[columns.label] if cell), 0))
        texts = isinstance(first[0], str)
        labels = LabelMap(tuple(str(classes[j]) if texts else j for j in range(len(classes))), task.answer)
    return Splits({split: _source(part, split) for split, part in rows.items()}, places, columns, labels)


def _source(rows: Any, split: str, *, preferences: bool = False) -> Source:
    source = of_dataset(rows, "dataset" if split == "train" else split)
    if not preferences:
        return source
    return replace(source, records=lambda: ((number, _chosen(row)) for number, row in source.records()))


def _chosen(row: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen answer of a preference after its prompt."""
    chosen, prompt = row["chosen"], row.get("prompt")
    if isinstance(chosen, list):
        return {"messages": [*(prompt or []), *chosen]}
    return {"prompt": prompt or "", "completion": chosen}
