"""Tokenised samples of a split: in memory, or in a memory-mapped Arrow file."""

import mmap
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class ArrowSamples(Sequence[dict[str, Any]]):
    """Rows of an Arrow table, each decoded into plain lists and numbers on access."""

    def __init__(self, table: pa.Table) -> None:
        from datasets import Dataset  # seconds to import

        # With a fingerprint, since `datasets` would read the whole table to compute one.
        self.dataset = Dataset(table, fingerprint=uuid4().hex)

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self.dataset[j] for j in range(*i.indices(len(self)))]
        return self.dataset[int(i)]  # datasets 4.0 takes no numpy integer

    @property
    def lengths(self) -> list[int]:
        table = self.dataset.data
        if "length" in table.column_names:
            return table["length"].to_pylist()
        return pc.list_value_length(table["input_ids"]).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def labels(self) -> np.ndarray:
        column = self.dataset.data["labels"]
        return np.array(column.to_pylist()) if pa.types.is_list(column.type) else column.to_numpy()


@dataclass(frozen=True, slots=True)
class TokenisedSplit:
    """Samples as a Trainer takes them: this is a map-style torch data set.

    Args:
        samples: dicts of input_ids, attention_mask, token_type_ids if the tokenizer makes them, and labels if any; or
            of a file, which `media.MediaCollator` decodes.
        hashes: a name for each sample that does not depend on the order.
        truncated: how many samples were cut to the maximal length.
        ids: the rows' places in their file, from 0.
        left_out: the place of every row whose target does not fit whole, and the tokens that it needs.
        cut_words: how many tokens with a tag are behind the cut, so that the model does not read them.
    """

    samples: Sequence[dict[str, Any]]
    hashes: tuple[str, ...]
    truncated: int
    ids: np.ndarray | None = None
    left_out: tuple[tuple[str, int], ...] = ()
    cut_words: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.samples[i]

    def take(self, places: Iterable[int]) -> "TokenisedSplit":
        """Some of the samples, in memory."""
        chosen = list(places)
        samples, hashes = [self.samples[j] for j in chosen], tuple(self.hashes[j] for j in chosen)
        return TokenisedSplit(samples, hashes, 0, None if self.ids is None else self.ids[chosen])

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample; steps of a recording, 0 for an image."""
        if isinstance(self.samples, ArrowSamples):
            return self.samples.lengths
        return [length_of(sample) for sample in self.samples]

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample: a number, or a row of k for several labels.  Tags have no such form."""
        if isinstance(self.samples, ArrowSamples):
            return self.samples.labels
        return np.array([sample["labels"] for sample in self.samples])


def length_of(sample: Mapping[str, Any]) -> int:
    """Tokens of a sample; of a file the steps of its recording, or 0."""
    return int(sample["length"]) if "length" in sample else len(sample["input_ids"])


def store(parts: Iterable[TokenisedSplit], folder: Path | None = None) -> TokenisedSplit:
    """Join parts into one split with its samples on disk; one part is in memory at a time.

    The samples are in a temporary file of `folder` (None: the system's) without a name, which vanishes with the
    process, however that ends.
    """
    hashes, ids, left_out, truncated, cut = list[str](), list[np.ndarray](), list[tuple[str, int]](), 0, 0
    writer: pa.RecordBatchStreamWriter | None = None
    with tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            hashes += part.hashes
            ids.append(np.arange(len(part)) if part.ids is None else part.ids)
            left_out += part.left_out
            truncated += part.truncated
            cut += part.cut_words
            if len(part):
                writer = writer or pa.ipc.new_stream(file, _schema(part[0]))
                writer.write_batch(pa.RecordBatch.from_pylist(list(part.samples), schema=_schema(part[0])))
        samples: Sequence[dict[str, Any]] = []
        if writer is not None:
            writer.close()
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            samples = ArrowSamples(pa.ipc.open_stream(pa.py_buffer(mapped)).read_all())
    return TokenisedSplit(samples, tuple(hashes), truncated, np.concatenate(ids), tuple(left_out), cut)


def _schema(sample: dict[str, Any]) -> pa.Schema:
    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string()}

    def kind(value: Any) -> pa.DataType:
        if not isinstance(value, list):
            return kinds[type(value)]
        return pa.list_(pa.float32() if value and isinstance(value[0], float) else pa.int32())

    return pa.schema([(key, kind(value)) for key, value in sample.items()])
