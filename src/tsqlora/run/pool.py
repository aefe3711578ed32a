"""The rows of a pool that are worth training on, as a `datasets.Dataset` for any trainer."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from tsqlora.data.columns import Columns, find_columns
from tsqlora.data.formats import Format, find_format
from tsqlora.data.generation import tokenise_generation
from tsqlora.data.labels import LabelMap, encode_labels, encode_targets
from tsqlora.data.prepare import resolve_max_length
from tsqlora.data.rows import CHUNK, Rows
from tsqlora.data.samples import TokenisedSplit, store
from tsqlora.data.tokenise import tokenise
from tsqlora.errors import DataError, SettingsError
from tsqlora.quality.epochs import sample
from tsqlora.quality.rule import Compute, RowNames, ScoringRule
from tsqlora.quality.score import score
from tsqlora.quality.subset import equals
from tsqlora.quality.trusted import Trusted
from tsqlora.tasks import Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.forward import task_of
from tsqlora.tasks.generation import Generation
from tsqlora.training.collate import collate_of
from tsqlora.training.load import positions_of


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
    """The share of a pool that teaches a model what trusted rows show, as a `datasets.Dataset` of the same columns.

    Text is drawn by reducible loss: what a model that knows the trusted rows alone has made of a row, and this one has
    not. Call it before an SFTTrainer or DPOTrainer is built, train on what it returns, and then once more on the
    trusted rows. The model is left as it was; one with an adapter (`get_peft_model`, `tsqlora.wrap`) is faster, since
    only the adapter learns the trusted rows.

    Args:
        dataset: a `datasets.Dataset`, or a list of dicts: texts, prompts with completions, chats, chosen with rejected
            answers (of which the chosen ones count), or texts with labels.
        trusted: rows of the same columns that look like what the model shall be good at; 32 to 200 are enough.
        fraction: share of the pool's rows to return.
        learning_rate, batch_size: of the training to come; the trusted model has twice that rate.
        max_length: tokens kept of a row; by default the model's own limit, at most 1,024.

    Raises DataError for columns without a known format, SettingsError for a stream.
    """
    from datasets import Dataset

    pool = _as_dataset(dataset, "dataset", Dataset)
    task = task_of(model)
    most = min(processing_class.model_max_length, 1024)
    limit = resolve_max_length(max_length, tokenizer_limit=most, positions=positions_of(model))
    reader = _Reader.of(pool, model, task, processing_class, limit)
    samples = store(reader.samples(pool))
    if len(samples) == 0:
        raise DataError(f"dataset: no row has a target that fits whole into {limit} tokens; raise max_length")
    if samples.left_out:
        warnings.warn(f"{len(samples.left_out)} rows whose targets do not fit whole are never drawn", stacklevel=2)
    known = None
    if trusted is not None:
        rows = store(reader.samples(_as_dataset(trusted, "trusted", Dataset)))
        known = Trusted(rows, learning_rate, batch_size, twins=equals(samples, rows))
    scores = score(
        model,
        samples,
        collate_of(task, model, processing_class, max_length=limit),
        rule=rule or ScoringRule(seed=seed),
        task=task,
        rows=RowNames(samples.ids, samples.hashes, samples.lengths),
        compute=Compute(batch_size),
        trusted=known,
    )
    if scores.even and scores.kept.all():
        warnings.warn("nothing tells the rows apart: they are drawn evenly; give trusted rows", stacklevel=2)
    assert samples.ids is not None
    return pool.select(samples.ids[sample(scores, fraction, seed)])


def _as_dataset(rows: Any, name: str, kind: Any) -> Any:
    if isinstance(rows, kind):
        return rows
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        return kind.from_list([dict(row) for row in rows])
    raise SettingsError(
        f"{name} is a {type(rows).__name__}; give a datasets.Dataset with rows, or a list of dicts (of a stream, those "
        "rows that fit: datasets.Dataset.from_list(list(stream.take(n))))"
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """How rows of these columns become samples of a model."""

    tokenizer: PreTrainedTokenizerBase
    limit: int
    seq2seq: bool
    format: Format | None
    columns: Columns | None
    labels: LabelMap | None
    preferences: bool

    @classmethod
    def of(cls, pool: Any, model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, limit: int) -> "_Reader":
        names = pool.column_names
        if isinstance(task, Generation):
            preferences = {"chosen", "rejected"} <= {*names}
            found = ["prompt", "completion"] if preferences else list(names)
            if preferences and isinstance(pool[0]["chosen"], list):
                found = ["messages"]
            return cls(tokenizer, limit, not task.causal, find_format(found, source="dataset"), None, None, preferences)
        columns = find_columns(names, text=None, text_pair=None, label=None, source="dataset")
        if columns.label is None:
            raise DataError(f"dataset has no label column; its columns are {', '.join(names)}")
        labels = None
        if isinstance(task, Classification):
            names_of = cast(Any, model).config.id2label
            texts = isinstance(pool[0][columns.label], str)
            labels = LabelMap(tuple(str(names_of[j]) if texts else j for j in range(len(names_of))))
        return cls(tokenizer, limit, False, None, columns, labels, False)

    def samples(self, rows: Any) -> Iterator[TokenisedSplit]:
        for start in range(0, len(rows), CHUNK):
            part = [self._row(rows[j]) for j in range(start, min(start + CHUNK, len(rows)))]
            numbers = tuple(range(start + 1, start + 1 + len(part)))
            chunk = Rows(tuple(part), "dataset", numbers, places=np.arange(start, start + len(part)))
            yield self._tokenised(chunk)

    def _tokenised(self, chunk: Rows) -> TokenisedSplit:
        if self.format is not None:
            options = {"max_length": self.limit, "seq2seq": self.seq2seq}
            return tokenise_generation(chunk, self.format, self.tokenizer, **options)
        assert self.columns is not None
        assert self.columns.label is not None
        column = self.columns.label
        labels = encode_targets(chunk, column) if self.labels is None else encode_labels(chunk, column, self.labels)
        return tokenise(chunk, self.columns, self.tokenizer, max_length=self.limit, labels=labels)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row itself; of a preference the chosen answer, behind its prompt."""
        if not self.preferences:
            return row
        chosen, prompt = row["chosen"], row.get("prompt")
        if isinstance(chosen, list):
            return {"messages": [*(prompt or []), *chosen]}
        return {"prompt": prompt or "", "completion": chosen}
