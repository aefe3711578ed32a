"""Adapters of every kind, saved by PEFT on tiny bases: what export and doctor are tested on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models import SIZES

LAYERS = SIZES["num_hidden_layers"]


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    """A causal model of two layers with two heads, of which keys and values have one."""
    config = LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    return _built(lambda: LlamaForCausalLM(config))


def tiny_gpt2_lm() -> GPT2LMHeadModel:
    """A causal model whose linear layers are Conv1D (weight i × o)."""
    config = GPT2Config(**SIZES, n_inner=32, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    return _built(lambda: GPT2LMHeadModel(config))


def save_base(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    return folder


def save_lora(folder: Path, base: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> Path:
    """An adapter as PEFT saves it, every A and B random; the base is used up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        assert isinstance(model, PeftModel)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name and "magnitude" not in name:
                    parameter.normal_(std=0.3)
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        # The base's config is not looked up by whatever name it has.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def lora_config(**options: Any) -> LoraConfig:
    """LoRA of rank 8 and scale 2 on all attention projections but the output's, for causal models."""
    arguments: Mapping[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **arguments, **options})


def _built(kind: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()
