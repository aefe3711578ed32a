"""The kinds of adapter that a reader may meet, each built on a tiny Llama: the doctor's cases."""

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from loras import lora_config, save_base, save_lora, tiny_llama
from models import SIZES, tiny_bert
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter, write_adapter
from tsqlora.adapter.lora import Target

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


def edit(folder: Path, **changed: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changed))


def bert_classifier(folder: Path, *, named: bool = True) -> Path:
    """An adapter with its head on a tiny BERT, which it names."""
    save_base(folder / "base", tiny_bert().float())
    config = lora_config(task_type="SEQ_CLS", target_modules=["query", "key", "value"])
    source = save_lora(folder / "a", tiny_bert().float(), config)
    edit(source, base_model_name_or_path=str(folder / "base") if named else "org/elsewhere")
    return source


def with_experts(folder: Path, **options: Any) -> Path:
    """With A and B on the parameters of a tiny Mixtral's experts."""
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4))
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return save_lora(folder, base, lora_config(**{"target_parameters": both, **options}))


def config_of(trainer: str) -> dict[str, Any]:
    """The adapter_config.json that a trainer wrote, but for the layers that it adapts."""
    return json.loads((Path(__file__).parent / "fixtures" / "adapters.json").read_text())[trainer]["config"]


def written_by(trainer: str, layers: Mapping[str, tuple[int, int]], **whole: tuple[int, int]) -> Build:
    """An adapter as another trainer writes it: its settings, and its names of layers (inputs, outputs)."""

    def build(folder: Path) -> Path:
        rng, config = np.random.default_rng(0), config_of(trainer)
        tensors = {f"base_model.model.{name}.weight": rng.normal(size=size) for name, size in whole.items()}
        for name, (inputs, outputs) in layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = rng.normal(size=(config["r"], inputs))
            tensors[f"base_model.model.{name}.lora_B.weight"] = rng.normal(size=(outputs, config["r"]))
        folder.mkdir(parents=True)
        save_numpy({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    return build


def changed(build: Build, **settings: Any) -> Build:
    """Another kind of adapter with some settings changed in its file."""

    def change(folder: Path) -> Path:
        edit(build(folder), **settings)
        return folder

    return change


def resized(folder: Path) -> Path:
    """On a base with four tokens more than the one that it names."""
    large = tiny_llama()
    large.resize_token_embeddings(64)
    source = save_lora(folder, large, lora_config(target_modules=["embed_tokens", "q_proj", "k_proj", "v_proj"]))
    return on_base(source, "base of another size")


def on_base(source: Path, name: str, *, tied: bool = False) -> Path:
    """Beside it a base's config, which it names."""
    tiny_llama(tied=tied).config.save_pretrained(source.parent / name)
    edit(source, base_model_name_or_path=str(source.parent / name))
    return source


def tied_twice(folder: Path) -> Path:
    both = lora_config(modules_to_save=["embed_tokens", "lm_head"])
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that the base ties them
        return on_base(save_lora(folder, tiny_llama(tied=True), both), "tied base", tied=True)


def empty(folder: Path) -> Path:
    """As ZeRO-3 saves what it has not gathered."""
    save_lora(folder, tiny_llama(), lora_config())
    save_file(dict.fromkeys(load_file(folder / WEIGHTS), torch.empty(0)), folder / WEIGHTS)
    return folder


def huge_header(folder: Path) -> Path:
    save_lora(folder, tiny_llama(), lora_config())
    (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    return folder


def path_in_a_name(folder: Path) -> Path:
    save_lora(folder, tiny_llama(), lora_config())
    save_file({**load_file(folder / WEIGHTS), "base_model.model.../../etc/passwd": torch.zeros(1)}, folder / WEIGHTS)
    return folder


def with_name_in_keys(folder: Path) -> Path:
    """A state_dict in place of what save_pretrained writes."""
    save_lora(folder, tiny_llama(), lora_config())
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


ATTENTION = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 8), "self_attn.v_proj": (16, 8)}
MLP = {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (16, 32), "mlp.up_proj": (16, 32), "mlp.down_proj": (32, 16)}
EVERY = {f"model.layers.{j}.{name}": size for j in (0, 1) for name, size in (ATTENTION | MLP).items()}
IMAGES = {
    f"model.{part}.layers.{j}.{name}": size
    for part in ("language_model", "vision_tower.vision_model.encoder")
    for j in (0, 1)
    for name, size in ATTENTION.items()
}
"""Of Gemma 3 in transformers from 4.52 on, by unsloth's FastVisionModel."""

UNREADABLE: Mapping[str, Build] = {
    "empty (ZeRO-3)": empty,
    "huge header": huge_header,
    "path in a name": path_in_a_name,
    "adapter's name in keys": with_name_in_keys,
}
"""The doctor names and refuses them: neither a server nor PEFT can apply them."""

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
    "trained tokens": saved(trainable_token_indices=[1, 2]),
    "resized vocabulary": resized,
    "tied twice": tied_twice,
    "experts": with_experts,
    "loftq": changed(saved(), init_lora_weights="loftq"),
    "olora": saved(init_lora_weights="olora"),
    "LLaMA-Factory, PEFT 0.18": written_by("LLaMA-Factory", EVERY),
    "LLaMA-Factory, resize_vocab": changed(
        written_by("LLaMA-Factory", EVERY, **{"lm_head": (60, 16), "model.embed_tokens": (60, 16)}),
        modules_to_save=["embed_tokens", "lm_head"],
    ),
    "axolotl, PEFT 0.20": written_by("axolotl", EVERY),
    "unsloth, texts": written_by("unsloth, texts", EVERY),
    "unsloth, images": written_by("unsloth, images", IMAGES),
}

if __name__ == "__main__":  # for bench/servers.py
    place = Path(sys.argv[1])
    tiny_llama().config.save_pretrained(place / "base")
    for kind, build in (KINDS | UNREADABLE).items():
        build(place / kind)
