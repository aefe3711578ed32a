"""What llama.cpp reads in an exported file is the adapter: names, order of rows, alpha / rank."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from loras import lora_config, save_base, save_lora, tiny_llama
from tsqlora.adapter.base import module_shapes
from tsqlora.adapter.files import read_adapter
from tsqlora.adapter.gguf import ARCHITECTURES, FILE, PERMUTED, read_gguf, write_gguf
from tsqlora.adapter.lora import LoraAdapter, Target
from tsqlora.adapter.tensors import Array
from tsqlora.adapter.verify import compare_updates
from tsqlora.errors import SettingsError
from tsqlora.training.export import export


def llama_cpp(path: Path) -> dict[str, Array]:
    """The updates that llama.cpp applies, by the names of its tensors, an embedding's token by token.

    src/llama-adapter.h at 215841f, get_scale: alpha / b->ne[0], where ne[0] is the last dimension
    here; a file without alpha (or 0) has scale 1.  src/llama-adapter.cpp at 0650ea8: what is no
    *.lora_a or *.lora_b is refused, and general.type and adapter.type are checked.
    """
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: np.array(t.data).astype(np.float64) for t in reader.tensors}
    updates = {}
    for name in tensors:
        assert name.endswith((".lora_a", ".lora_b")), name
        base = name[: -len(".lora_a")]
        a, b = tensors[f"{base}.lora_a"], tensors[f"{base}.lora_b"]
        scale = alpha / b.shape[-1] if alpha else 1.0
        updates[base] = scale * (a @ b.T if base == "token_embd.weight" else b @ a)
    return updates


def as_transformers_has_it(update: Array, name: str, config: Any) -> Array:
    """A tensor of llama.cpp's read back by transformers' own loader of GGUF files.

    It has no loader of its own for what llama.cpp treats as a Llama.
    """
    like = "llama" if config.model_type in PERMUTED else config.model_type
    processor = TENSOR_PROCESSORS.get(like, TensorProcessor)(config=config.to_dict())
    return processor.process(update, name).weights


@given(
    ranks=st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any),
    alphas=st.lists(st.sampled_from((1, 8, 0.3)), min_size=5, max_size=5),
    use_rslora=st.booleans(),
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_file_is_the_adapter_whatever_its_ranks_and_scales(
    ranks: list[int], alphas: list[float], use_rslora: bool, tmp_path: Path
) -> None:
    names = [f"model.layers.{j}.{n}" for j in (0, 1) for n in ("self_attn.q_proj", "self_attn.k_proj")]
    chosen = {name: rank for name, rank in zip([*names, "model.embed_tokens"], ranks, strict=True) if rank}
    given_alphas = {
        name: alpha for name, alpha in zip([*names, "model.embed_tokens"], alphas, strict=True) if name in chosen
    }
    options = {"rank_pattern": chosen, "alpha_pattern": given_alphas, "use_rslora": use_rslora}
    base = tiny_llama()
    config = base.config
    source = read_adapter(save_lora(tmp_path / "a", base, lora_config(target_modules=sorted(chosen), **options)))
    write_gguf(source, config, tmp_path / FILE)
    theirs = llama_cpp(tmp_path / FILE)
    assert len(theirs) == len(source.targets)
    for name, target in source.targets.items():
        part = {"embed_tokens": "token_embd", "q_proj": "attn_q", "k_proj": "attn_k"}[name.rpartition(".")[2]]
        stored = f"{part}.weight" if part == "token_embd" else f"blk.{name.split('.')[2]}.{part}.weight"
        mine = target.delta().T if target.kind == "embedding" else target.delta()
        restored = as_transformers_has_it(theirs[stored], stored, config)
        np.testing.assert_allclose(restored, mine, rtol=1e-6, atol=1e-6 * np.abs(mine).max())
    assert compare_updates(source, read_gguf(tmp_path / FILE, source, config), "F32").used <= 1
    (tmp_path / FILE).unlink()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_linear_layer_of_an_architecture_is_where_transformers_finds_it(model_type: str, tmp_path: Path) -> None:
    config = small(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    draw = np.random.default_rng(0).standard_normal
    targets = {
        name: Target(draw((2, shape.inputs), np.float32), draw((shape.outputs, 2), np.float32), 2.0)
        for name, shape in module_shapes(model).items()
        if shape.kind == "linear" and name != "lm_head"
    }
    write_gguf(LoraAdapter({"r": 2}, targets), config, tmp_path / FILE)
    theirs = llama_cpp(tmp_path / FILE)
    assert len(theirs) == len(targets)
    maps = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type]), config.num_hidden_layers)
    for name, target in targets.items():
        stored = maps.get_name(f"{name}.weight", try_suffixes=(".weight",))
        assert stored is not None
        restored = as_transformers_has_it(theirs.pop(stored), stored, config)
        # transformers turns GPT-2's for its Conv1D, whose weight is i × o.
        mine = target.delta().T if model_type == "gpt2" else target.delta()
        np.testing.assert_allclose(restored, mine, rtol=1e-6, atol=1e-5)
    assert not theirs


def small(model_type: str) -> Any:
    """A config of two layers, with fewer heads of keys than of queries where the model has them."""
    if model_type == "gpt2":
        return GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)
    sizes: Mapping[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **sizes)
    config.tie_word_embeddings = False
    return config


def test_a_uniform_adapter_is_stored_bit_for_bit(tmp_path: Path) -> None:
    source = read_adapter(save_lora(tmp_path / "a", tiny_llama(), lora_config(target_modules=["v_proj", "lm_head"])))
    write_gguf(source, tiny_llama().config, tmp_path / FILE)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / FILE).tensors}
    target = source.targets["model.layers.1.self_attn.v_proj"]
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_a"], target.a)
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], target.b)
    assert "output.weight.lora_a" in tensors


def test_the_export_is_compared_by_update_and_logits(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    config = lora_config(rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 5})
    save_lora(tmp_path / "a", tiny_llama(), config)
    report = export(tmp_path / "a", tmp_path / "out", format="gguf", base=str(tmp_path / "base"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]
    assert report["relative_difference"] < 1e-6
    assert report["logits_difference"] < 1e-4
    assert "max_lora_rank" not in report
    half = export(tmp_path / "a", tmp_path / "half", format="gguf", base=str(tmp_path / "base"), dtype="float16")
    assert half["bytes"] < 0.7 * report["bytes"]


def test_without_the_package_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_adapter(save_lora(tmp_path / "a", tiny_llama(), lora_config()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SettingsError, match=r"tsqlora\[gguf\]"):
        write_gguf(source, tiny_llama().config, tmp_path / FILE)
