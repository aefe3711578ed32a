"""Samples -> padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from tsqlora.data.generation import IGNORED
from tsqlora.errors import SettingsError

# For every shape the processor's library prepares a kernel, which costs time and some 350 KB; GPUs like it too.
MULTIPLE = 8


def collator(tokenizer: PreTrainedTokenizerBase, *, max_length: int, positions: int | None) -> DataCollatorWithPadding:
    """Pads a batch to the next multiple of 8 tokens, where the model has so many positions."""
    longest = -(-max_length // MULTIPLE) * MULTIPLE
    fits = positions is None or longest <= positions
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=MULTIPLE if fits else None)


@dataclass(frozen=True, slots=True)
class GenerationCollator:
    """Pads input_ids, attention_mask and labels, if there are any; other keys are left out.

    Args:
        pad: the token that inputs are filled up with; the attention mask is 0 there, and labels are -100.
        seq2seq: labels are of a length of their own; else they are as long as the inputs.
        multiple: lengths are rounded up to a multiple of this.
        left: inputs are filled up on the left, so that what a causal model writes follows on them.
    """

    pad: int
    seq2seq: bool
    multiple: int
    left: bool

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad, "attention_mask": 0, "labels": IGNORED}
        batch = {}
        for key in (key for key in fill if key in samples[0]):
            left = self.left and not (self.seq2seq and key == "labels")
            batch[key] = _padded([sample[key] for sample in samples], fill[key], self.multiple, left=left)
        return batch


def generation_collator(
    tokenizer: PreTrainedTokenizerBase, *, seq2seq: bool, multiple: int = MULTIPLE, left: bool = False
) -> GenerationCollator:
    """Pads to the right for training and scoring, to the left for writing.

    Raises SettingsError for a tokenizer with neither a padding nor an end token.
    """
    return GenerationCollator(padding_of(tokenizer), seq2seq, multiple, left)


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to fill up with: the tokenizer's padding, else its end token."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(pad, int):
        raise SettingsError("the tokenizer has neither a padding nor an end token; set one")
    return pad


def _padded(rows: Sequence[Sequence[int]], fill: int, multiple: int, *, left: bool) -> Tensor:
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = torch.full((len(rows), width), fill, dtype=torch.int64)
    for j, row in enumerate(rows):
        kept = slice(width - len(row), width) if left else slice(0, len(row))
        padded[j, kept] = torch.tensor(row, dtype=torch.int64)
    return padded
