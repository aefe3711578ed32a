"""Added tokens whose rows were made by resizing differ from trained ones, without a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tsqlora.auditing.texts.vocabulary import looks_untrained, untrained_tokens

RNG = np.random.default_rng(0)
TRAINED = RNG.normal(0.1, 1, (300, 32)) * RNG.uniform(0.5, 1.5, (300, 1))


@pytest.mark.parametrize(
    ("rows", "untrained"),
    [
        (TRAINED[:3] * 1.1, set()),
        (np.zeros((2, 32)), {300, 301}),
        (np.repeat(TRAINED[:1], 3, axis=0) * 1.2, {300, 301, 302}),
        (TRAINED.mean(axis=0, keepdims=True), {300}),
        (TRAINED[5:6] * 50, {300}),
        (np.concatenate([TRAINED[:1] * 1.3, TRAINED[1:2] * 1e-3]), {301}),
    ],
)
def test_copies_means_and_outlying_norms_look_untrained(rows: np.ndarray, untrained: set[int]) -> None:
    table = np.concatenate([TRAINED, rows])
    added = range(300, len(table))
    assert looks_untrained(lambda ids: table[list(ids)], len(table), [*added, 10**6]) == untrained


def test_rows_are_read_from_the_file_and_from_a_model_that_does_not_train_them(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=302, **sizes)).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[300:] = 0
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    for folder in ("whole", "parts"):
        assert untrained_tokens(str(tmp_path / folder), [5, 300, 301]) == {300, 301}
    assert untrained_tokens(str(tmp_path), [300]) == set()
    assert untrained_tokens(model, [300, 301]) == set()  # all of it is trained
    model.requires_grad_(False)
    assert untrained_tokens(model, [300, 301]) == {300, 301}
