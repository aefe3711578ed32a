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
        keys: the lists that a sample has, "input_ids" among them.
        sizes: the length of each list, sample by sample in the order of `keys`.
        labels: their labels where these are numbers, None where they are lists or there are none.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        sizes: Sequence[int],
        labels: Sequence[int] | Sequence[float] | None,
    ) -> None:
        self.path, self.keys = path, tuple(keys)
        self._sizes = np.asarray(sizes, dtype=np.int32).reshape(-1, len(self.keys))
        self._ends = np.cumsum(self._sizes.sum(axis=1, dtype=np.int64)) * _TOKEN.itemsize
        self._labels = None if labels is None else np.asarray(labels)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return self._sizes[:, self.keys.index("input_ids")].tolist()

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        sizes = self._sizes[i]
        size = int(sizes.sum()) * _TOKEN.itemsize
        # Opened anew: a file that is mapped or kept open does not go to another process with the data set.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(int(self._ends[i]) - size)
            lists = np.split(np.frombuffer(file.read(size), dtype=_TOKEN), np.cumsum(sizes)[:-1])
        sample: dict[str, Any] = {key: values.tolist() for key, values in zip(self.keys, lists, strict=True)}
        return sample if self._labels is None else sample | {"labels": self._labels[i].item()}


def store_samples(parts: Iterable[Sequence[dict[str, Any]]], path: Path) -> StoredSamples:
    """Writes samples, which come in parts, of which one is in memory at a time."""
    keys: list[str] = []
    sizes: list[int] = []
    labels: list[Any] = []
    with open(path, "wb") as file:
        for part in parts:
            for sample in part:
                keys = keys or [key for key, value in sample.items() if isinstance(value, list)]
                for key in keys:
                    file.write(np.array(sample[key], dtype=_TOKEN).tobytes())
                sizes.extend(len(sample[key]) for key in keys)
                labels.extend([] if "labels" in keys or "labels" not in sample else [sample["labels"]])
    return StoredSamples(path, keys, sizes, labels or None)
