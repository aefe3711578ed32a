"""Tokenised samples in a file: in memory are a few numbers of each."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

_TOKEN = np.dtype(np.int32)


class StoredSamples(Sequence[dict[str, Any]]):
    """Samples as `tokenise` makes them, each read from the file when it is asked for.

    Args:
        path: the file; of each sample one list after the other, in the order of `keys`.
        keys: the lists that a sample has, all of one length.
        lengths: tokens of each sample.
        labels: their labels, None where they have none.
    """

    def __init__(
        self, path: Path, keys: Sequence[str], lengths: Sequence[int], labels: Sequence[int] | Sequence[float] | None
    ) -> None:
        self.path, self.keys = path, tuple(keys)
        self._lengths = np.asarray(lengths, dtype=np.int32)
        self._ends = np.cumsum(self._lengths, dtype=np.int64) * (len(self.keys) * _TOKEN.itemsize)
        self._labels = None if labels is None else np.asarray(labels)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return self._lengths.tolist()

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        length = int(self._lengths[i])
        size = length * len(self.keys) * _TOKEN.itemsize
        # Opened anew: a file that is mapped or kept open does not go to another process with the data set.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(int(self._ends[i]) - size)
            lists = np.frombuffer(file.read(size), dtype=_TOKEN).reshape(len(self.keys), length).tolist()
        sample: dict[str, Any] = dict(zip(self.keys, lists, strict=True))
        return sample if self._labels is None else sample | {"labels": self._labels[i].item()}


def store_samples(parts: Iterable[Sequence[dict[str, Any]]], path: Path) -> StoredSamples:
    """Writes samples, which come in parts, of which one is in memory at a time."""
    keys: list[str] = []
    lengths: list[int] = []
    labels: list[Any] = []
    with open(path, "wb") as file:
        for part in parts:
            for sample in part:
                keys = keys or [key for key in sample if key != "labels"]
                lists = np.array([sample[key] for key in keys], dtype=_TOKEN)
                file.write(lists.tobytes())
                lengths.append(lists.shape[1])
                labels.extend([sample["labels"]] if "labels" in sample else [])
    return StoredSamples(path, keys, lengths, labels or None)
