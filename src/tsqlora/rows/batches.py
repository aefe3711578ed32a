"""Order samples, and pad them into batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from tsqlora.errors import SettingsError
from tsqlora.libs.shapes import Int

IGNORED = -100
"""The label of a token without loss."""

# Batches among which samples are sorted: more pads less, fewer mixes better.
MEGABATCH = 50

# The processor's library prepares a kernel for every shape, which costs time and some 350 KB; GPUs like it too.
MULTIPLE = 8


def bucketed_order(lengths: Sequence[int], *, batch_size: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A random permutation in which each run of `batch_size` samples has similar lengths.

    Shuffle, sort inside megabatches of 50 batches, cut into batches, shuffle the batches.
    A smaller last batch stays last, so that the runs are the batches of a DataLoader.
    """
    assert batch_size >= 1, batch_size
    sizes = np.asarray(lengths, dtype=np.int64)
    megabatches = _cut(rng.permutation(len(sizes)), MEGABATCH * batch_size)
    batches = [batch for mega in megabatches for batch in _cut(_longest_first(mega, sizes), batch_size)]
    full = len(sizes) // batch_size
    order = [*rng.permutation(full).tolist(), *range(full, len(batches))]
    return np.concatenate([np.empty(0, dtype=np.int64), *(batches[j] for j in order)])


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[Int[np.ndarray, " b"]]:
    """Batches of sample indices, the longest samples first: a batch that is too large fails at once.

    >>> [batch.tolist() for batch in sorted_batches([1, 9, 5], 2)]
    [[1, 2], [0]]
    """
    assert batch_size >= 1, batch_size
    sizes = np.asarray(lengths, dtype=np.int64)
    return _cut(_longest_first(np.arange(len(sizes)), sizes), batch_size)


def _longest_first(indices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    # Stable: samples of one length must come out in the same order on every machine.
    return indices[np.argsort(-sizes[indices], kind="stable")]


def _cut(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def collator(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int, positions: int | None, tags: bool = False
) -> DataCollatorWithPadding | DataCollatorForTokenClassification:
    """Pad a batch, and its `tags` with -100, to the next multiple of 8 tokens, if the model has enough positions."""
    fits = positions is None or -(-max_length // MULTIPLE) * MULTIPLE <= positions
    kind = DataCollatorForTokenClassification if tags else DataCollatorWithPadding
    return kind(tokenizer, pad_to_multiple_of=MULTIPLE if fits else None)


def padded_labels(labels: Sequence[Any], width: int | None = None) -> np.ndarray:
    """Labels of samples as an array; tags become n × `width`, with -100 behind each row's own.

    >>> padded_labels([[1, 2], [3]], 3).tolist()
    [[1, 2, -100], [3, -100, -100]]
    """
    if width is None:
        return np.array(labels)
    return np.array([[*row, *[IGNORED] * (width - len(row))] for row in labels])


@dataclass(frozen=True, slots=True)
class GenerationCollator:
    """Pad input_ids, attention_mask and labels, if any; drop other keys.

    Args:
        pad: the padding token of inputs; the attention mask is 0 there, and labels are -100.
        seq2seq: labels and inputs differ in length; else they are equally long.
        multiple: round lengths up to a multiple of this.
        left: pad inputs on the left, so that a causal model continues them.
    """

    pad: int
    seq2seq: bool
    multiple: int
    left: bool

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad, "attention_mask": 0, "labels": IGNORED}
        batch = {}
        for key in (key for key in fill if key in samples[0]):
            rows, left = [sample[key] for sample in samples], self.left and not (self.seq2seq and key == "labels")
            width = -(-max(map(len, rows)) // self.multiple) * self.multiple
            batch[key] = torch.full((len(rows), width), fill[key], dtype=torch.int64)
            for j, row in enumerate(rows):
                span = slice(width - len(row), width) if left else slice(0, len(row))
                batch[key][j, span] = torch.tensor(row, dtype=torch.int64)
        return batch


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pad chosen and rejected answers: input_ids, attention_mask and targets are n × 2 × t.

    `reference` is the reference model's log-ratio of the answers, 0 before it was measured, and `labels` count targets.
    """

    padded: GenerationCollator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.padded([answer for sample in samples for answer in sides_of(sample)])
        pairs = {key: value.unflatten(0, (-1, 2)) for key, value in batch.items()}
        targets = pairs.pop("labels")
        reference = torch.tensor([[sample.get("reference", 0.0)] for sample in samples])
        return {**pairs, "targets": targets, "reference": reference, "labels": (targets != IGNORED).sum((1, 2))}


def sides_of(sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the chosen and the rejected answer of a pair, each behind its prompt."""
    for part in (slice(sample["second"]), slice(sample["second"], None)):
        yield {key: sample[key][part] for key in ("input_ids", "attention_mask", "labels")}


def generation_collator(
    tokenizer: PreTrainedTokenizerBase, *, seq2seq: bool, multiple: int = MULTIPLE, left: bool = False
) -> GenerationCollator:
    """Pad on the right for training and scoring, on the left for writing, with the padding or else the end token.

    Raises SettingsError for a tokenizer that has neither.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(pad, int):
        raise SettingsError("the tokenizer has neither a padding nor an end token; set its pad_token")
    return GenerationCollator(pad, seq2seq, multiple, left)
