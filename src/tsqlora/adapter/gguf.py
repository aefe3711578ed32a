"""Write and read LoRA files for llama.cpp: its tensor names, its order of rows, and one alpha."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.adapter.lora import LoraAdapter, Target, tied_targets
from tsqlora.adapter.rewrite import commonest_scale, require_plain
from tsqlora.adapter.tensors import Array, rounded
from tsqlora.errors import SettingsError, UnsupportedError, nearest

FILE = "adapter.gguf"

ARCHITECTURES = {
    "arcee": "ARCEE",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "granite": "GRANITE",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "smollm3": "SMOLLM3",
    "starcoder2": "STARCODER2",
}
PERMUTED = ("arcee", "granite", "llama", "mistral", "smollm3")
"""llama.cpp's name for each model_type; for PERMUTED it reorders the rows of q and k.

The gguf package maps the names of some 120 architectures, but not the weights that llama.cpp's converter rearranges.
These are checked: conversion/llama.py and granite.py permute the rows of q and k for rotary embeddings; the others
change norms only, or nothing.
"""


def require_exportable(adapter: LoraAdapter, config: Any) -> None:
    """Raise UnsupportedError for an adapter that a LoRA file of llama.cpp cannot hold."""
    require_plain(adapter, "a GGUF file")
    if heads := adapter.heads():
        raise UnsupportedError(
            f"the adapter has the saved module {heads[0]}, which llama.cpp's format cannot hold; use --format merged"
        )
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"the base is a {config.model_type}, for which llama.cpp's arrangement of weights was not checked; "
            f"{nearest(config.model_type, ARCHITECTURES)}"
        )
    if config.tie_word_embeddings and (names := tied_targets(adapter)):
        raise UnsupportedError(
            f"{names[0]} shares its weight with another layer of the base, and llama.cpp takes no adapter on it; use "
            "--format merged"
        )


def write_gguf(adapter: LoraAdapter, config: Any, path: Path, dtype: str = "F32") -> None:
    """Write the file; raises as `require_exportable`.

    llama.cpp scales each layer by alpha / its rank; any other scale is folded into B.
    """
    gguf = _gguf()
    require_exportable(adapter, config)
    (architecture, names), scale = _names(config), commonest_scale(adapter.targets.values())
    ranks = Counter(t.rank for t in adapter.targets.values() if t.rank and t.scale == scale)
    # Most layers then need no folding. Exact in float32, as the file has it; never 0, which llama.cpp reads as none.
    alpha = float(np.float32(scale * max(ranks, key=lambda rank: (ranks[rank], rank), default=1)))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, target in adapter.targets.items():
        if target.rank == 0:
            continue
        b = target.b.astype(np.float64) * (target.scale * target.rank / alpha)
        if heads := _heads(name, config):
            b = permuted(b, heads)
        # llama.cpp looks up tokens in A, so A is stored by token.
        a = target.a.T if target.kind == "embedding" else target.a
        stored = _stored_name(names, name, target)
        for suffix, matrix in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{stored}.{suffix}", rounded(matrix, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, source: LoraAdapter, config: Any) -> LoraAdapter:
    """Read a file as llama.cpp does, with the names of the source adapter."""
    gguf = _gguf()
    reader = gguf.GGUFReader(path)
    tensors = {t.name: np.array(t.data).reshape(*reversed(t.shape.tolist())) for t in reader.tensors}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    (_, names), targets = _names(config), {}
    for name, original in source.targets.items():
        if original.rank == 0:
            continue
        stored = _stored_name(names, name, original)
        a, b = tensors.pop(f"{stored}.lora_a"), tensors.pop(f"{stored}.lora_b")
        if original.kind == "embedding":
            a = a.T
        if heads := _heads(name, config):
            b = b[permuted(np.arange(b.shape[0])[:, None], heads).flatten().argsort()]
        targets[name] = replace(
            original, a=a, b=b, scale=alpha / b.shape[1], dtype="F16" if b.dtype == np.float16 else "F32"
        )
    assert not tensors, f"tensors without a target: {', '.join(tensors)}"
    return replace(source, targets=targets)


def _stored_name(names: Any, name: str, target: Target) -> str:
    stored = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
    if stored is None or (target.kind == "embedding" and stored != "token_embd.weight"):
        raise UnsupportedError(f"llama.cpp does not apply LoRA to {name}; use --format merged")
    return stored


def permuted(rows: Array, heads: int) -> Array:
    """Rows of q or k in llama.cpp's order: in each head the halves of a rotary embedding alternate.

    >>> permuted(np.arange(4)[:, None], 1).flatten().tolist()
    [0, 2, 1, 3]
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _heads(name: str, config: Any) -> int | None:
    """The number of heads of a layer whose rows llama.cpp reorders; None for other layers."""
    if config.model_type not in PERMUTED or not name.endswith(("q_proj", "k_proj")):
        return None
    heads: int = config.num_attention_heads
    return (getattr(config, "num_key_value_heads", None) or heads) if name.endswith("k_proj") else heads


def _names(config: Any) -> tuple[Any, Any]:
    """The model's architecture, and the map of its tensors' names."""
    gguf = _gguf()
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    return architecture, gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise SettingsError("--format gguf needs the package gguf; install it: pip install 'tsqlora[gguf]'") from None
    return gguf


DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16"}
"""Precisions of the file."""
