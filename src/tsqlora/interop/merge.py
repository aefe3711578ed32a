"""A plain transformers model: the base with the adapter's update in its weights, and the heads that came with it."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tsqlora.errors import UnsupportedError
from tsqlora.interop.lora import LoraAdapter


def merge_into(base: PreTrainedModel, adapter: LoraAdapter, folder: Path) -> PreTrainedModel:
    """The base, which is used up, with the adapter of a directory merged into it by PEFT.

    Raises UnsupportedError for a base whose weights are packed: merging would round them again.
    """
    if getattr(base, "is_quantized", False):
        raise UnsupportedError("the base is quantised, and merging would round it again; give the base it was made of")
    if any(target.kind == "embedding" or name.endswith("lm_head") for name, target in adapter.targets.items()):
        _untie(base)
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    return merged


def _untie(model: PreTrainedModel) -> None:
    """An output layer that shares the embedding's weight gets its own: an update of one is none of the other's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Model and tokenizer, as transformers saves them: safetensors."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def reload(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """What was saved, read back as the same class in the same precision."""
    kind = type(like)
    return kind.from_pretrained(folder, dtype=like.dtype if like.dtype.is_floating_point else torch.float32).eval()
