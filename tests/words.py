"""A tiny Llama that writes, and its tokenizer of whole words."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models import SIZES

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{j}" for j in range(40))]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} "
    "{{ eos_token }} {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: j for j, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = CHAT
    return made


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = SIZES | {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes | special))
