"""Adapters that load and do nothing, or break the model: each is named, with a cure, from the files alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinds import saved
from loras import lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from tsqlora.errors import DataError
from tsqlora.interop.doctor import examine, faults_in
from tsqlora.interop.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.interop.health import faults as fault_list
from tsqlora.run.export import export

Change = Callable[[str, Tensor], tuple[str, Tensor]]


def adapter(folder: Path, change: Change = lambda key, tensor: (key, tensor), **options: Any) -> Path:
    """An adapter of a tiny Llama, which names its base beside it, with each tensor and its key changed."""
    save_base(folder / "base", tiny_llama())
    source = saved(**options)(folder / "a")
    tensors = load_file(source / WEIGHTS)
    save_file(dict(change(key, tensor) for key, tensor in tensors.items()), source / WEIGHTS)
    return named(source, folder / "base")


def without_b(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, tensor * 0 if "lora_B" in key else tensor


def named(source: Path, base: Path) -> Path:
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return source


def faults(source: Path) -> dict[str, str]:
    return {fault["name"]: fault["cure"] for fault in examine(source)["faults"]}


def test_a_trained_adapter_has_no_fault(tmp_path: Path) -> None:
    assert faults(adapter(tmp_path)) == {}


def test_an_adapter_whose_b_is_zero_everywhere_does_nothing(tmp_path: Path) -> None:
    assert list(faults(adapter(tmp_path, without_b))) == ["every update is zero"]


def test_a_head_that_was_trained_alone_is_no_fault(tmp_path: Path) -> None:
    assert faults(adapter(tmp_path, without_b, modules_to_save=["lm_head"])) == {}


def test_numbers_that_are_not_finite_are_a_fault(tmp_path: Path) -> None:
    broken = adapter(tmp_path, lambda key, tensor: (key, tensor * (math.nan if "0.self_attn.q" in key else 1)))
    assert list(faults(broken)) == ["not finite"]


@pytest.mark.parametrize("part", ["lora_", "lora_B"])
def test_empty_tensors_are_those_of_zero_3(part: str, tmp_path: Path) -> None:
    source = adapter(tmp_path, lambda key, tensor: (key, torch.empty(0) if part in key else tensor))
    with pytest.raises(DataError, match=r"empty tensors.*ZeRO-3.*stage3_gather"):
        examine(source)


def test_an_adapter_of_another_family_matches_no_key_of_the_base(tmp_path: Path) -> None:
    source = adapter(tmp_path / "llama")
    save_base(tmp_path / "gpt2", tiny_gpt2_lm())
    assert list(faults(named(source, tmp_path / "gpt2"))) == ["no key matches the base"]


def test_another_prefix_alone_is_no_fault_since_transformers_renames_checkpoints(tmp_path: Path) -> None:
    assert (
        faults(adapter(tmp_path, lambda key, t: (key.replace("model.layers", "model.language_model.layers"), t))) == {}
    )


@pytest.mark.parametrize("name", ["default", "policy"])
def test_keys_with_an_adapters_name_match_nothing_in_peft(name: str, tmp_path: Path) -> None:
    source = adapter(tmp_path, lambda key, tensor: (key.replace(".weight", f".{name}.weight"), tensor))
    with pytest.raises(DataError, match=r"no key matches.*save_pretrained"):
        examine(source)


def test_keys_without_pefts_prefix_match_nothing_in_peft(tmp_path: Path) -> None:
    source = adapter(tmp_path, lambda key, tensor: (key.removeprefix("base_model.model."), tensor))
    with pytest.raises(DataError, match="no key matches"):
        examine(source)


def test_a_base_of_another_size_is_a_fault(tmp_path: Path) -> None:
    wide = "0.self_attn.q_proj.lora_A.weight"
    source = adapter(tmp_path, lambda key, tensor: (key, torch.ones(8, 24) if key.endswith(wide) else tensor))
    (fault,) = examine(source)["faults"]
    assert fault["name"] == "shapes differ from the base"
    assert list(fault["layers"]) == ["model.layers.0.self_attn.q_proj is 16 × 24, the base's 16 × 16"]


def test_towers_of_two_widths_may_have_layers_of_one_name(tmp_path: Path) -> None:
    source = read_adapter(adapter(tmp_path))
    shapes = {name: (16, 16) if "q_proj" in name else (8, 16) for name in source.targets}
    vision = {name.replace("model.", "vision."): (64, 64) for name in source.targets}
    assert fault_list(source, shapes | vision) == fault_list(source, vision | shapes) == []


def test_a_resized_vocabulary_is_a_fault_with_its_cure(tmp_path: Path) -> None:
    def grown(key: str, tensor: Tensor) -> tuple[str, Tensor]:
        return key, torch.cat([tensor, tensor[:4]]) if "lm_head" in key else tensor

    source = adapter(tmp_path, grown, modules_to_save=["lm_head"])
    assert "resize_token_embeddings" in faults(source)["shapes differ from the base"]


def test_a_resized_vocabulary_is_seen_in_the_config_alone(tmp_path: Path) -> None:
    def grown(key: str, tensor: Tensor) -> tuple[str, Tensor]:
        return key, torch.cat([tensor, tensor[:4]]) if "lm_head" in key else tensor

    source = adapter(tmp_path, grown, modules_to_save=["lm_head"])
    (tmp_path / "base" / "model.safetensors").unlink()
    report = examine(source)
    (fault,) = report["faults"]
    assert (fault["name"], fault["layers"]) == ("shapes differ from the base", ("lm_head has 64 tokens",))
    refused = [one for one in report["consumers"] if "enlarged" in " ".join(one["reasons"])]
    assert {one["server"] for one in refused} == {"PEFT", "vLLM", "SGLang", "llama.cpp", "MLX"}
    assert not any(one["mend"] for one in report["consumers"]), "no export fits the base that is named"


TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's


@TIED
@pytest.mark.parametrize("apart", [False, True])
def test_tied_weights_that_were_saved_twice_are_named_and_merged_as_two(apart: bool, tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama(tied=True))
    both = lora_config(modules_to_save=["embed_tokens", "lm_head"])
    source = named(save_lora(tmp_path / "a", tiny_llama(tied=True), both), tmp_path / "base")
    tensors = load_file(source / WEIGHTS)
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    tensors[head] = tensors[embedding] + (0.1 if apart else 0.0)
    save_file(tensors, source / WEIGHTS)
    cure = faults(source)["tied weights were saved twice"]
    assert ("trained apart" in cure) == apart
    export(source, tmp_path / "out", format="merged")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], tensors[head])
    assert torch.equal(merged["model.embed_tokens.weight"], tensors[embedding])
    save_base(tmp_path / "base", tiny_llama(tied=False))
    assert faults(source) == {}


@TIED
def test_a_head_that_was_trained_on_a_tied_base_is_merged_as_its_own_weight(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama(tied=True))
    source = save_lora(tmp_path / "a", tiny_llama(tied=True), lora_config(modules_to_save=["lm_head"]))
    export(named(source, tmp_path / "base"), tmp_path / "out", format="merged")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], load_file(source / WEIGHTS)["base_model.model.lm_head.weight"])


@pytest.mark.parametrize("part", ["lm_head", "trainable_tokens"])
def test_what_was_trained_beside_the_layers_must_be_in_the_file(part: str, tmp_path: Path) -> None:
    option = {"modules_to_save": [part]} if part == "lm_head" else {"trainable_token_indices": [1, 2]}
    assert faults(adapter(tmp_path / "whole", **option)) == {}
    source = adapter(tmp_path / "cut", **option)
    tensors = load_file(source / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if part not in key}, source / WEIGHTS)
    assert list(faults(source)) == ["a trained module is not in the file"]


def test_a_run_says_so_if_what_it_saved_does_nothing(tmp_path: Path) -> None:
    source = adapter(tmp_path, without_b)
    assert [fault.partition(":")[0] for fault in faults_in(source)] == ["every update is zero"]
    (source / WEIGHTS).write_bytes(b"")
    assert "cannot be read" in faults_in(source)[0]
