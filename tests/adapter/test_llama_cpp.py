"""llama.cpp itself runs our GGUF adapters, on tiny bases, and says what PEFT says; skipped where it is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from loras import lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from tsqlora.adapter.gguf import ARCHITECTURES, FILE, PERMUTED, permuted
from tsqlora.adapter.verify import probe_rows
from tsqlora.training.export import export

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'tsqlora[llamacpp]'")

FLOAT32 = 0
"""ggml's number of it: keys and values are kept in float16 otherwise."""


def tiny_qwen2() -> Qwen2ForCausalLM:
    """Two layers whose rows llama.cpp leaves in place, with biases."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    config.tie_word_embeddings, config.initializer_range = False, 0.3
    return Qwen2ForCausalLM(config).eval()


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens")
RANKS = {"0.self_attn.q_proj": 1, "k_proj": 3, "1.mlp.up_proj": 9, "embed_tokens": 5, "down_proj": 2}
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": LAYERS, "rank_pattern": RANKS}),
    "llama, one scale": (
        tiny_llama,
        {"target_modules": LAYERS, "rank_pattern": RANKS, "alpha_pattern": {k: 2 * r for k, r in RANKS.items()}},
    ),
    "llama, rsLoRA": (
        tiny_llama,
        {"target_modules": LAYERS, "rank_pattern": RANKS, "alpha_pattern": {"v_proj": 0.3}, "use_rslora": True},
    ),
    "qwen2": (tiny_qwen2, {"target_modules": LAYERS, "rank_pattern": RANKS}),
    "gpt2": (
        tiny_gpt2_lm,
        {
            "target_modules": ["c_attn", "c_fc", "mlp.c_proj", "wte"],
            "rank_pattern": {"0.attn.c_attn": 3, "wte": 2, "1.mlp.c_fc": 12},
            "alpha_pattern": {"c_fc": 5},
            "fan_in_fan_out": True,
        },
    ),
}


def write_base(model: PreTrainedModel, path: Path) -> None:
    """A GGUF file of a tiny model, without a vocabulary, in float32."""
    config: Any = model.config
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    heads, dimension = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", heads)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(dimension)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(dimension // heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().numpy()
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            tensor = tensor.T
        for layer, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if config.model_type in PERMUTED and f".{layer}." in name:
                tensor = permuted(tensor, count)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_says(base: Path, adapter: Path | None, rows: Tensor) -> Tensor:
    """Log-probabilities of the next token after each of the rows' tokens, by llama.cpp."""
    model = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )
    scores = []
    for row in rows.tolist():
        model.reset()
        model.eval(row)
        scores.append(torch.from_numpy(model.scores[: len(row)].copy()))
    model.close()
    return torch.stack(scores).log_softmax(-1)


def peft_says(model: Any, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows).logits.log_softmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_says_what_peft_says(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    save_base(tmp_path / "base", build())
    write_base(build(), tmp_path / "base.gguf")
    save_lora(tmp_path / "a", build(), lora_config(**options))
    export(tmp_path / "a", tmp_path / "out", format="gguf", base=str(tmp_path / "base"))
    rows = probe_rows(build())["input_ids"]
    plain = peft_says(build(), rows)
    # ggml reads GELU off a table in float16.
    allowed = 1e-2 if case == "gpt2" else 1e-3
    torch.testing.assert_close(llama_says(tmp_path / "base.gguf", None, rows), plain, rtol=0, atol=allowed)
    adapted = peft_says(PeftModel.from_pretrained(build(), str(tmp_path / "a")), rows)
    theirs = llama_says(tmp_path / "base.gguf", tmp_path / "out" / FILE, rows)
    torch.testing.assert_close(theirs, adapted, rtol=0, atol=allowed)
    assert float((adapted - plain).abs().max()) > 1, "the adapter does something"
