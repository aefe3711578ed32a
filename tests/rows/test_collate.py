"""What is padded does not count, on either side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from byte_tokenizers import PAD, byte_tokenizer
from runs import save_checkpoint
from tsqlora.errors import SettingsError
from tsqlora.rows.batches import IGNORED, collator, generation_collator

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5)


def sample_of(inputs: int, targets: int, *, seq2seq: bool) -> dict[str, Any]:
    ids = list(range(5, 5 + inputs))
    labels = list(range(30, 30 + targets)) if seq2seq else [IGNORED] * (inputs - 1) + ids[-1:]
    return {"input_ids": ids, "attention_mask": [1] * inputs, "labels": labels}


@given(LENGTHS, st.booleans(), st.booleans(), st.sampled_from([1, 8]))
def test_without_padding_a_batch_is_its_samples(
    lengths: list[tuple[int, int]], seq2seq: bool, left: bool, multiple: int
) -> None:
    samples = [sample_of(*pair, seq2seq=seq2seq) for pair in lengths]
    batch = generation_collator(byte_tokenizer(), seq2seq=seq2seq, multiple=multiple, left=left)(samples)
    assert all(rows.shape[1] % multiple == 0 and rows.dtype == torch.int64 for rows in batch.values())
    for j, sample in enumerate(samples):
        real = batch["attention_mask"][j].bool()
        assert batch["input_ids"][j][real].tolist() == sample["input_ids"]
        assert (batch["input_ids"][j][~real] == PAD).all()
        assert bool(real[-1] if left else real[0])
        labels = batch["labels"][j]
        if seq2seq:
            assert labels[labels != IGNORED].tolist() == sample["labels"]
            assert labels[0] != IGNORED  # targets stand on the left whatever the inputs do
        else:
            assert labels[real].tolist() == sample["labels"]
            assert (labels[~real] == IGNORED).all()


def test_a_batch_is_no_wider_than_it_must_be() -> None:
    samples = [sample_of(9, 3, seq2seq=True), sample_of(2, 8, seq2seq=True)]
    batch = generation_collator(byte_tokenizer(), seq2seq=True)(samples)
    assert {key: tuple(rows.shape) for key, rows in batch.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
        "labels": (2, 8),
    }


def test_prompts_alone_have_no_labels() -> None:
    batch = generation_collator(byte_tokenizer(), seq2seq=False, left=True)([{"input_ids": [5], "attention_mask": [1]}])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_end_token_pads_where_there_is_no_other() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert generation_collator(tokenizer, seq2seq=False).pad == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(SettingsError, match="neither a padding nor an end token"):
        generation_collator(tokenizer, seq2seq=False)


@pytest.mark.parametrize(
    ("max_length", "positions", "expected"), [(32, 32, 16), (30, 32, 16), (30, 31, 13), (30, None, 16)]
)
def test_batches_are_padded_to_a_multiple_of_8_where_the_model_has_the_positions(
    max_length: int, positions: int | None, expected: int, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_checkpoint(tmp_path))
    batch = collator(tokenizer, max_length=max_length, positions=positions)(
        [{"input_ids": list(range(4, 4 + n)), "labels": 0} for n in (13, 9)]
    )
    assert batch["input_ids"].shape == (2, expected)
    assert batch["attention_mask"].sum(1).tolist() == [13, 9]
