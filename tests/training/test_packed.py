"""Models that mix up samples that share a row are refused by name."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from byte_tokenizers import byte_tokenizer
from tsqlora.data.batches import packed_collator
from tsqlora.errors import UnsupportedError
from tsqlora.training.packed import require_packing

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SAMPLE = {"input_ids": [7, 9, 11, 30, 8], "labels": [7, 9, 11, 30, 8]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_keeps_samples_apart_and_opt_does_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    collate = packed_collator(byte_tokenizer(), max_length=32)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, initializer_range=0.3)).to(dtype)
    require_packing(llama, collate, SAMPLE)
    assert llama.training
    opt = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3)).to(dtype)
    with pytest.raises(
        UnsupportedError, match=r"data\.packing: to opt a sample is not the same behind another in a row"
    ):
        require_packing(opt, collate, SAMPLE)
