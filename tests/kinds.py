"""The kinds of adapter that a reader may meet, each built on a tiny Llama: the doctor's cases."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from loras import lora_config, save_lora, tiny_llama
from tsqlora.interop.files import WEIGHTS, read_adapter, write_adapter
from tsqlora.interop.lora import Target

Q0, Q1 = (f"model.layers.{j}.self_attn.q_proj" for j in (0, 1))
Build = Callable[[Path], Path]


def saved(**options: Any) -> Build:
    """An adapter as PEFT saves it, with these options of `lora_config`."""
    return lambda folder: save_lora(folder, tiny_llama(), lora_config(**options))


def with_rank_zero(folder: Path) -> Path:
    source = read_adapter(save_lora(folder / "whole", tiny_llama(), lora_config()))
    empty = Target(np.zeros((0, 16)), np.zeros((16, 0)), 1.0)
    config = {**source.config, "rank_pattern": {Q1: 0}}
    write_adapter(replace(source, targets={**source.targets, Q1: empty}, config=config), folder)
    return folder


def damaged(folder: Path) -> Path:
    """NaN in one layer, two zero slots and a doubled one in another, nothing in a third."""
    save_lora(folder, tiny_llama(), lora_config())
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    tensors[name.format(0, "q_proj", "A")][0, 0] = math.nan
    tensors[name.format(0, "k_proj", "A")][:2] = 0
    tensors[name.format(0, "k_proj", "A")][3] = 2 * tensors[name.format(0, "k_proj", "A")][4]
    tensors[name.format(1, "v_proj", "B")][:] = 0
    save_file(tensors, folder / WEIGHTS)
    return folder


def classifier(folder: Path) -> Path:
    """With a head that PEFT saved whole, since the task asks for it."""
    base = LlamaForSequenceClassification(tiny_llama().config)
    return save_lora(folder, base, lora_config(task_type="SEQ_CLS"))


KINDS: Mapping[str, Build] = {
    "uniform": saved(),
    "ranks, one scale": saved(rank_pattern={Q0: 4}, alpha_pattern={Q0: 8}),
    "ranks, one alpha": saved(rank_pattern={"q_proj": 32}),
    "alphas": saved(alpha_pattern={"k_proj": 4}),
    "rslora": saved(use_rslora=True),
    "a layer without": saved(target_modules=[Q0, "k_proj", "v_proj"]),
    "q alone": saved(target_modules=["q_proj"]),
    "q and v": saved(target_modules=["q_proj", "v_proj"]),
    "up alone": saved(target_modules=["up_proj"]),
    "mlp": saved(target_modules=["gate_proj", "up_proj", "down_proj"]),
    "rank 0": with_rank_zero,
    "dora": saved(use_dora=True),
    "embedding": saved(target_modules=["embed_tokens", "q_proj", "v_proj"]),
    "head": saved(modules_to_save=["lm_head"]),
    "classifier": classifier,
    "damaged": damaged,
    "pissa": saved(init_lora_weights="pissa"),
    "small rank": saved(r=4, lora_alpha=8),
    "bias of B": saved(bias="lora_only"),
}

if __name__ == "__main__":  # for bench/servers.py
    place = Path(sys.argv[1])
    tiny_llama().config.save_pretrained(place / "base")
    for kind, build in KINDS.items():
        build(place / kind)
