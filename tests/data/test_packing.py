"""Samples that share a row are as if they were alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from byte_tokenizers import byte_tokenizer
from tsqlora.data.batches import IGNORED, PackedCollator, generation_collator, pack, packed_collator

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def llama(attention: str) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))


def mistral(attention: str) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, attn_implementation=attention))


def gpt2(attention: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=2, eos_token_id=2, initializer_range=0.3, attn_implementation=attention)
    )


def samples_of(lengths: list[int], vocab: int = 60) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, vocab, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED, *ids[1:]]} for ids in rows]


def differences(model: PreTrainedModel, collate: PackedCollator, samples: list[dict[str, Any]]) -> list[float]:
    batch = collate(samples)
    batch.pop("labels")
    rows = pack([len(sample["input_ids"]) for sample in samples], collate.max_length)
    result = []
    with torch.no_grad():
        packed: Any = model.eval()(**batch).logits
        for logits, row in zip(packed, rows, strict=True):
            start = 0
            for j in row:
                alone = model(input_ids=torch.tensor([samples[j]["input_ids"]])).logits[0]
                result.append(float((logits[start : start + len(alone)] - alone).abs().max()))
                start += len(alone)
    return result


@given(LENGTHS, st.integers(1, 40))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int], most: int) -> None:
    rows = pack(lengths, most)
    assert sorted(j for row in rows for j in row) == list(range(len(lengths)))
    assert all(sum(lengths[j] for j in row) <= most or len(row) == 1 for row in rows)
    half_empty = [row for row in rows if 2 * sum(lengths[j] for j in row) <= most]
    assert len(half_empty) <= 1  # two would share one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2, mistral])
def test_logits_are_those_of_the_sample_alone(make: Any, attention: str) -> None:
    torch.manual_seed(0)
    collate = packed_collator(byte_tokenizer(), max_length=20)
    assert max(differences(make(attention), collate, samples_of([5, 9, 3, 7, 12, 1]))) < 1e-5


def test_the_loss_and_its_gradient_are_those_of_the_padded_batch() -> None:
    torch.manual_seed(0)
    model, tokenizer, samples = llama("sdpa").double(), byte_tokenizer(), samples_of([5, 9, 3, 7])
    result = []
    for collate in (packed_collator(tokenizer, max_length=20), generation_collator(tokenizer, seq2seq=False)):
        model.zero_grad()
        loss: Any = model(**collate(samples)).loss
        loss.backward()
        result.append((loss.detach(), model.get_input_embeddings().weight.grad.clone()))  # type: ignore[union-attr]
    torch.testing.assert_close(result[0], result[1], atol=1e-6, rtol=1e-5)


def test_the_first_token_of_a_sample_is_not_trained_on_as_the_last_ones_next() -> None:
    samples = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9])]
    batch = packed_collator(byte_tokenizer(), max_length=8)(samples)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def test_stories(shared_dir: Path) -> None:
    # In double precision, where rounding hides nothing; in single it is 1e-5.
    model = AutoModelForCausalLM.from_pretrained(shared_dir / "models" / "stories260K", dtype=torch.float64)
    collate = packed_collator(byte_tokenizer(), max_length=128)
    assert max(differences(model, collate, samples_of([40, 61, 17, 90, 25], vocab=500))) < 1e-9
