"""Families of models: chat templates as they are published, a tokenizer trained here, tiny random weights."""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from days.values import WORDS

OWN = Path(__file__).parent / "templates"
POSITIONS = 8_192
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A published template by the name of its file, "" for none; the first of its specials ends a text."""

    template: str
    architecture: str
    specials: tuple[str, ...]
    stops: tuple[str, ...]
    bos: str | None = None
    pieces: str = "bytes"
    """Bytes as in GPT-2, or words with a "▁" before them, with one at the beginning of a text ("first") or not."""
    adds_bos: bool = False
    turns: str = ""
    """What opens a turn; a text that holds it was already rendered."""


_CHATML = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_LLAMA = (
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
    "<|eom_id|>",
)
_GEMMA = ("<eos>", "<end_of_turn>", "<start_of_turn>", "<bos>")
_GEMMA4 = ("<turn|>", "<eos>", "<|turn>", "<bos>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
_GEMMA4 = (*_GEMMA4, "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", "<|think|>")
_MISTRAL = ("</s>", "[INST]", "[/INST]", "<s>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL = (*_MISTRAL, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_TURNS = ("<|user|>", "<|assistant|>", "<|system|>")
_DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK = (
    *_DEEPSEEK,
    *(f"<｜tool▁{a}{b}｜>" for a in ("calls", "call", "outputs", "output") for b in ("▁begin", "▁end")),
)
_GLM = ("<|endoftext|>", *_TURNS, "<|observation|>", "[gMASK]", "<sop>")
_HARMONY = ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>")

FAMILIES = {
    "qwen 2.5": Family("qwen2_5", "qwen2", _CHATML, _CHATML[::2], turns="<|im_start|>"),
    "llama 3": Family("llama3", "llama", _LLAMA, _LLAMA[:2], "<|begin_of_text|>", adds_bos=True, turns=_LLAMA[2]),
    "gpt-2": Family("", "gpt2", ("<|endoftext|>",), ("<|endoftext|>",)),
    "qwen 3": Family("qwen3", "qwen3", _CHATML, _CHATML[::2], turns="<|im_start|>"),
    "llama 3.1": Family("llama3_1", "llama", _LLAMA, _LLAMA[:2], "<|begin_of_text|>", adds_bos=True, turns=_LLAMA[2]),
    "gemma": Family("gemma", "gemma", _GEMMA, _GEMMA[:2], "<bos>", "never", adds_bos=True, turns=_GEMMA[2]),
    "gemma 3": Family("gemma3", "gemma2", _GEMMA, _GEMMA[:2], "<bos>", "never", adds_bos=True, turns=_GEMMA[2]),
    "gemma 4": Family("gemma4", "gemma2", _GEMMA4, _GEMMA4[:2], "<bos>", "never", adds_bos=True, turns=_GEMMA4[2]),
    "mistral": Family("mistral", "mistral", _MISTRAL, _MISTRAL[:1], "<s>", "first", adds_bos=True, turns="[INST]"),
    "mistral nemo": Family("mistral_nemo", "mistral", _MISTRAL, _MISTRAL[:1], "<s>", adds_bos=True, turns="[INST]"),
    "phi 3": Family("phi3", "phi3", ("<|endoftext|>", "<|end|>", *_TURNS), ("<|endoftext|>", "<|end|>"), None, "first"),
    "falcon": Family("", "falcon", ("<|endoftext|>",), ("<|endoftext|>",)),
    "falcon 3": Family("falcon3", "llama", ("<|endoftext|>", *_TURNS), ("<|endoftext|>",), turns="<|user|>"),
    "glm 4.5": Family("glm4moe", "glm", _GLM, (*_GLM[:2], _GLM[4]), turns="<|user|>"),
    "deepseek r1": Family("deepseek_r1_distill", "qwen2", _DEEPSEEK, _DEEPSEEK[:1], _DEEPSEEK[1], turns=_DEEPSEEK[2]),
    "deepseek v3": Family("deepseekv3", "llama", _DEEPSEEK, _DEEPSEEK[:1], _DEEPSEEK[1], turns=_DEEPSEEK[2]),
    "gpt-oss": Family("gptoss", "llama", _HARMONY, (_HARMONY[0], _HARMONY[5]), turns="<|start|>"),
}


def template_of(family: Family) -> str | None:
    """The text of the family's template; TRL brings those that it knows."""
    if not family.template:
        return None
    trl = find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    paths = [folder / f"{family.template}.jinja" for folder in (OWN, Path(trl.origin).parent / "chat_templates")]
    return next(path for path in paths if path.exists()).read_text(encoding="utf-8")


@cache
def home() -> Path:
    """A folder for the models of this process, which goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="days-")
    _FOLDERS.append(folder)
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@cache
def tokenizer_of(name: str) -> Any:
    """The family's tokenizer as whoever loads the checkpoint gets it: some architectures normalise texts."""
    return AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=False)


def _trained_tokenizer(name: str) -> Any:
    """A tokenizer of the family with words of all scripts."""
    family = FAMILIES[name]
    texts = [' {"name": "value", "type": "function"}', "What is the ", *WORDS.values()] * 3
    special = [AddedToken(token, special=True, normalized=False) for token in (*family.specials, "<pad>")]
    inner = Tokenizer(BPE())
    by_bytes = family.pieces == "bytes"
    if by_bytes:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=family.pieces)
        alphabet = ["▁"]
    options: dict[str, Any] = {"vocab_size": 1_200, "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator(texts, BpeTrainer(**options))
    if not by_bytes:
        inner = _with_bytes(inner, family)
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=family.specials[0],
        pad_token="<pad>",
        bos_token=family.bos,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )
    if family.adds_bos:
        _open_with(tokenizer, str(family.bos))
    tokenizer.chat_template = template_of(family)
    return tokenizer


def _with_bytes(trained: Tokenizer, family: Family) -> Tokenizer:
    """The same merges, with a token for each byte that has no other."""
    model = json.loads(trained.to_str())["model"]
    vocab = {token: j for j, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]])}
    merges = [tuple(pair) for pair in model["merges"]]
    inner = Tokenizer(BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = trained.pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if family.pieces == "first" else steps)
    return inner


def _open_with(tokenizer: Any, bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    inner = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, inner.token_to_id(bos))]
    )


@cache
def model_folder(name: str) -> Path:
    """A checkpoint of the family with tiny random weights."""
    family, tokenizer = FAMILIES[name], _trained_tokenizer(name)
    folder = home() / name.replace(" ", "-")
    sizes: dict[str, Any] = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if family.architecture == "gpt2":
        sizes |= {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 1, "n_head": 2}
    if family.architecture in ("gpt2", "falcon"):
        sizes = {key: size for key, size in sizes.items() if key not in ("head_dim", "num_key_value_heads")}
    ends = tokenizer.convert_tokens_to_ids(list(family.stops))
    config = AutoConfig.for_model(
        family.architecture, **sizes, eos_token_id=ends[0], bos_token_id=tokenizer.bos_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
