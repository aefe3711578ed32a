"""The comparison of an export with its source: in blocks, whatever the size of a layer."""

import copy
import tracemalloc
from collections.abc import Callable
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

from models import SIZES
from tsqlora.adapter import verify
from tsqlora.adapter.lora import LoraAdapter, Target
from tsqlora.adapter.tensors import Stored
from tsqlora.errors import TsqLoraError

TOKENS, WIDTH = 30_000, SIZES["hidden_size"]
WHOLE = 8 * TOKENS * WIDTH
"""Bytes of a head in float64."""
HEADS = pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])


def large(name: str) -> LoraAdapter:
    """A LoRA of a head or an embedding with many tokens, beside a saved copy of another head."""
    rng = np.random.default_rng(0)
    a, b, head = (rng.normal(size=shape).astype(np.float32) for shape in ((2, WIDTH), (TOKENS, 2), (TOKENS, WIDTH)))
    target = Target(a, b, 0.5) if name == "lm_head" else Target(b.T, a.T, 0.5, "embedding")
    return LoraAdapter({}, {name: target}, {"score.weight": Stored(head)})


def peak_of(work: Callable[[], verify.Difference], monkeypatch: pytest.MonkeyPatch) -> tuple[int, verify.Difference]:
    """The bytes that numpy holds at most for blocks of a hundredth, which give the same as one block."""
    monkeypatch.setattr(verify, "VALUES", 1 << 30, raising=False)
    whole = work()
    monkeypatch.setattr(verify, "VALUES", TOKENS * WIDTH // 100, raising=False)
    tracemalloc.start()
    try:
        difference = work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert difference.layer == whole.layer
    numbers = [[one for one in astuple(each) if isinstance(one, float)] for each in (difference, whole)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    return peak, difference


@HEADS
def test_updates_of_a_large_head_are_compared_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = large(name)
    target = source.targets[name]
    other = replace(target, b=target.b * np.float32(1 + 1e-7))
    export = replace(source, targets={name: other})
    peak, difference = peak_of(lambda: verify.compare_updates(source, export, "F32"), monkeypatch)
    assert peak < WHOLE
    assert 0 < difference.used <= 1


@HEADS
def test_a_large_merged_head_is_compared_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = replace(large(name), saved={})
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": TOKENS}, tie_word_embeddings=False))
    merged, delta = copy.deepcopy(base), torch.from_numpy(adapter.targets[name].delta())
    with torch.no_grad():
        merged.get_parameter(f"{name}.weight").add_(delta if name == "lm_head" else delta.T)
    peak, difference = peak_of(lambda: verify.compare_weights(base, merged, adapter), monkeypatch)
    assert peak < WHOLE
    assert (difference.layer, 0 < difference.used <= 1) == (f"{name}.weight", True)


def test_a_merged_convolution_is_compared() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    base, name = ResNetForImageClassification(config), "resnet.embedder.embedder.convolution"
    target = Target(np.full((1, 3, 7, 7), 0.5, np.float32), np.ones((8, 1, 1, 1), np.float32), 2.0, "convolution")
    merged = copy.deepcopy(base)
    with torch.no_grad():
        merged.get_parameter(f"{name}.weight").add_(1.0)
    assert verify.compare_weights(base, merged, LoraAdapter({}, {name: target})).used <= 1
    with pytest.raises(TsqLoraError, match=f"{name}.weight differs by 1"):
        verify.compare_weights(base, base, LoraAdapter({}, {name: target}))
