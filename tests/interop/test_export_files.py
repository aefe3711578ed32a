"""Any LoRA directory is read as PEFT reads it; an error names what is unsafe or broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from loras import lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from tsqlora.errors import DataError
from tsqlora.interop.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.interop.patterns import scale_of
from tsqlora.run.export import export

EVERYTHING = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]
CONFIGS: dict[str, Callable[[], tuple[Any, LoraConfig]]] = {
    "patterns": lambda: (
        tiny_llama(),
        lora_config(
            target_modules=EVERYTHING,
            rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 5, "embed_tokens": 2},
            alpha_pattern={"down_proj": 3, r".*\.1\..*": 7},
        ),
    ),
    "rslora": lambda: (tiny_llama(), lora_config(use_rslora=True, rank_pattern={"k_proj": 3})),
    "Conv1D": lambda: (tiny_gpt2_lm(), lora_config(target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_update_is_the_one_that_peft_computes(kind: str, tmp_path: Path) -> None:
    base, config = CONFIGS[kind]()
    save_lora(tmp_path, base, config)
    model = PeftModel.from_pretrained(CONFIGS[kind]()[0], str(tmp_path))
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    targets = read_adapter(tmp_path).targets
    assert targets.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert targets[name].scale == layer.scaling["default"]
        turned = isinstance(layer.get_base_layer(), nn.Embedding) or config.fan_in_fan_out
        mine = targets[name].delta().T if turned else targets[name].delta()
        np.testing.assert_allclose(
            mine, cast(Any, layer).get_delta_weight("default").detach().numpy(), rtol=1e-5, atol=1e-6
        )


NAMES = ("layers.0.q", "layers.1.q", "layers.10.q", "layers.0.mlp.up", "up")
KEYS = st.sampled_from((*NAMES, "q", "0.q", "mlp.up", r".*\.1.*", "layers.(0|1).*", "^up"))


@given(
    ranks=st.dictionaries(KEYS, st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(KEYS, st.sampled_from((1, 3, 0.5, 16)), max_size=4),
    use_rslora=st.booleans(),
)
def test_patterns_are_matched_as_peft_matches_them(ranks: Any, alphas: Any, use_rslora: bool) -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2)})
    layers = nn.ModuleDict({"0": nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})})
    for number in ("0", "1", "10"):
        if number not in layers:
            layers[number] = nn.ModuleDict()
        layers[number]["q"] = nn.Linear(2, 2)  # type: ignore[operator]
    model["layers"] = layers
    config = LoraConfig(
        target_modules=list(NAMES), rank_pattern=ranks, alpha_pattern=alphas, r=4, lora_alpha=6, use_rslora=use_rslora
    )
    inject_adapter_in_model(config, model)
    for name in NAMES:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        assert scale_of(name, config.to_dict()) == (layer.r["default"], layer.scaling["default"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_lora(tmp_path / "adapter", tiny_llama(), lora_config())


def edit_config(folder: Path, **changed: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 0}, "r is 0"),
        ({"r": 10**400}, "r is"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"rank_pattern": {"q" * 3000: 2}}, "rank_pattern"),
        ({"rank_pattern": {"(?i)q": 2}}, r"rank_pattern .* '\(\?i\)q'"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern .* '\('"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
        ({"task_type": ["SEQ_CLS"]}, "task_type"),
        ({"r": 4}, "_proj: .* 8 × 16 F32"),
    ],
)
def test_broken_settings_are_named(changed: dict[str, Any], named: str, folder: Path) -> None:
    edit_config(folder, **changed)
    with pytest.raises(DataError, match=named) as refused:
        read_adapter(folder)
    assert len(str(refused.value)) < 1600


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(FIRST), r"q_proj has .*lora_B\.weight"),
        (lambda t: t.update({FIRST: torch.zeros(4, 16)}), "lora_A is 4 × 16 F32, lora_B 16 × 8"),
        (lambda t: t.update({FIRST: torch.zeros(8)}), "lora_A is 8 F32"),
        (lambda t: t.update({FIRST: torch.zeros(8, 0)}), "lora_A is 8 × 0 F32"),
        (lambda t: t.update({FIRST: torch.zeros(8, 16, dtype=torch.int8)}), "8 × 16 I8"),
        (lambda t: t.update({FIRST: torch.zeros(8, 16).to(torch.float8_e4m3fn)}), "8 × 16 F8_E4M3"),
        (lambda t: t.update({"base_model.model.../../etc/passwd": torch.zeros(1)}), "etc/passwd"),
        (lambda t: t.update({"base_model.model.a..b.weight": torch.zeros(1)}), "a..b"),
        (lambda t: t.update({"base_model.model.h.\u00b2.weight": torch.zeros(1)}), "h."),
        (lambda t: t.update({f"base_model.model.{'1' * 5000}.weight": torch.zeros(1)}), "1111"),
        (lambda t: t.update({"lora_te.weight": torch.zeros(1)}), "lora_te"),
        (lambda t: [t.pop(key) for key in list(t)], "no lora_A"),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit: Callable[[Any], Any], named: str, folder: Path) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(DataError, match=named) as refused:
        read_adapter(folder)
    assert len(str(refused.value)) < 1600


def test_a_pickle_is_refused_by_name_and_not_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(DataError, match=r"adapter_model\.bin"):
        read_adapter(folder)


def test_files_that_are_missing_or_broken_are_named(folder: Path, tmp_path: Path) -> None:
    for place, named in ((tmp_path / "nowhere", "nowhere"), (tmp_path, CONFIG)):
        with pytest.raises(DataError, match=named):
            read_adapter(place)
    (folder / WEIGHTS).write_bytes(b"no safetensors at all")
    with pytest.raises(DataError, match=WEIGHTS):
        read_adapter(folder)
    for text in ("{", "[]"):
        (folder / CONFIG).write_text(text)
        with pytest.raises(DataError, match=CONFIG):
            read_adapter(folder)


def test_a_link_out_of_the_directory_is_refused_and_one_into_the_hub_cache_is_not(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (folder / WEIGHTS).rename(elsewhere)
    (folder / WEIGHTS).symlink_to(elsewhere)
    with pytest.raises(DataError, match="elsewhere"):
        read_adapter(folder)
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, blob in ((CONFIG, folder / CONFIG), (WEIGHTS, elsewhere)):
        blob.rename(blobs / name[:12])
        (snapshot / name).symlink_to(blobs / name[:12])
    assert read_adapter(snapshot).rank == 8


@pytest.mark.parametrize("format", ["peft", "universal"])
def test_the_weight_that_peft_copies_beside_an_embedding_is_no_head(format: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    save_lora(tmp_path / "a", tiny_llama(), lora_config(target_modules=["embed_tokens"]))
    copied = {"base_model.model.model.embed_tokens.base_layer.weight": tiny_llama().model.embed_tokens.weight.detach()}
    edit_tensors(tmp_path / "a", lambda t: t.update(copied))
    assert read_adapter(tmp_path / "a").heads() == []
    export(tmp_path / "a", tmp_path / "out", format=format, base=str(tmp_path / "base"))
    assert bool(read_adapter(tmp_path / "out").base_layers) == (format == "peft")
