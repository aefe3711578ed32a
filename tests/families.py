"""Tokenizers like those of well-known models: turn markers, end tokens and chat templates, one token a byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from byte_tokenizers import byte_tokenizer

_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"


@dataclass(frozen=True, slots=True)
class Family:
    """Special tokens, of which the first ends a text; what `generate` stops at; and whether there is a system role."""

    template: str
    specials: tuple[str, ...]
    stops: tuple[str, ...]
    bos: str | None = None
    system: bool = True


FAMILIES = {
    "llama 3": Family(
        "{{ bos_token }}{% for m in messages %}{{ " + _HEADER + " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"),
        ("<|end_of_text|>", "<|eot_id|>"),
        "<|begin_of_text|>",
    ),
    "qwen 2.5": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen 3, thinking": Family(
        "{% set last = messages | length - 1 %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if loop.index0 == last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') if loop.index0 != last else m.content }}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma 2": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<end_of_turn>", "<start_of_turn>", "<bos>"),
        ("<eos>", "<end_of_turn>"),
        "<bos>",
        system=False,
    ),
    "gemma 3": Family(
        "{{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
        "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
        "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<end_of_turn>", "<start_of_turn>", "<bos>"),
        ("<eos>", "<end_of_turn>"),
        "<bos>",
    ),
    "qwen 2.5, tools": Family(
        "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You are helpful.' }}"
        "{% if tools %}\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>{% endif %}"
        "<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n"
        "</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
        "{{ m.content }}\n</tool_response><|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
        ("</s>", "[INST]", "[/INST]", "<s>"),
        ("</s>",),
        "<s>",
        system=False,
    ),
    "phi 3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        ("<|endoftext|>", "<|end|>"),
    ),
    "smollm 2, pad is end": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>", "<|im_start|>"),
        ("<|im_end|>",),
        "<|im_start|>",
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("</s>", "<s>"),
        ("</s>",),
        "<s>",
    ),
}


def tokenizer_of(family: Family) -> Any:
    """A tokenizer of the family."""
    tokenizer = byte_tokenizer(opens=False, closes=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.specials)})
    tokenizer.eos_token = family.specials[0]
    tokenizer.pad_token = family.specials[0]
    tokenizer.bos_token = family.bos
    tokenizer.chat_template = family.template
    return tokenizer


def trained_tokenizer(family: Family, texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the family with words of these texts, in place of bytes."""
    inner, made = Tokenizer(BPE()), {"vocab_size": size, "initial_alphabet": ByteLevel.alphabet()}
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteDecoder()
    options: dict[str, Any] = {**made, "special_tokens": list(family.specials), "show_progress": False}
    inner.train_from_iterator(texts, BpeTrainer(**options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=family.specials[0])
    tokenizer.chat_template = family.template
    return tokenizer
