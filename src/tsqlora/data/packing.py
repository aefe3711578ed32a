"""Several samples in one row, each as if it were alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tsqlora.data.collate import MULTIPLE, padding_of
from tsqlora.data.generation import IGNORED


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which samples share a row of at most `max_length` tokens: the longest first, each into the first row with room.

    Rows and the samples in a row are in ascending order. A sample that is longer has a row of its own.

    >>> pack([3, 6, 2, 1], 8)
    [[0, 3], [1, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for j in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        row = next((k for k, left in enumerate(room) if lengths[j] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(j)
        room[row] -= lengths[j]
    return sorted(sorted(row) for row in rows)


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Batches of fewer rows than samples, for training a causal model.

    Positions start anew with each sample, and there is neither attention mask nor cache: from that
    transformers makes the mask, of whatever kind the model's attention takes, that keeps each
    sample to itself. The first token of a sample follows from nothing, and is not trained on.

    Args:
        pad: the token that rows are filled up with; its positions are those of one more sample.
        max_length: tokens of a row, unless a sample has more.
        multiple: rows are rounded up to a multiple of this.
    """

    pad: int
    max_length: int
    multiple: int

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        rows = pack(lengths, self.max_length)
        width = max(sum(lengths[j] for j in row) for row in rows)
        width = -(-width // self.multiple) * self.multiple
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            over = width - sum(lengths[j] for j in row)
            ids = [token for j in row for token in samples[j]["input_ids"]]
            labels = [label for j in row for label in (IGNORED, *samples[j]["labels"][1:])]
            positions = [place for j in row for place in range(lengths[j])]
            columns["input_ids"].append(ids + [self.pad] * over)
            columns["labels"].append(labels + [IGNORED] * over)
            columns["position_ids"].append([*positions, *range(over)])
        batch: dict[str, Any] = {key: torch.tensor(values) for key, values in columns.items()}
        return {**batch, "use_cache": False}


def packed_collator(tokenizer: PreTrainedTokenizerBase, *, max_length: int, multiple: int = MULTIPLE) -> PackedCollator:
    """Packs each batch's samples into rows of `max_length` tokens.  Raises SettingsError as `generation_collator`."""
    return PackedCollator(padding_of(tokenizer), max_length, multiple)
