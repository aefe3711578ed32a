"""A directory in PEFT's format, read without trust: adapter_config.json and adapter_model.safetensors, nothing else.

No pickle is opened, no link followed out of the directory (a hub cache's own excepted), no code run.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tsqlora.errors import DataError
from tsqlora.interop.lora import Kind, LoraAdapter, Target
from tsqlora.interop.patterns import PATTERNS, require_quick, scale_of
from tsqlora.interop.tensors import PRECISIONS, Stored, read_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_MATRIX = re.compile(r"(?P<name>.+)\.(?P<matrix>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_TEXTS = ("base_model_name_or_path", "task_type", "revision")
_LARGEST = 1e9
"""Of ranks and alphas, whose quotients are then numbers."""
_MOST_CONFIG_BYTES = 1 << 24
_LONGEST_NAME = 500
_FURTHER = re.compile(r"\.(lora_\w+|token_adapter|trainable_tokens_\w+)(\.|$)")


def read_adapter(folder: Path) -> LoraAdapter:
    """The adapter in a directory, whoever wrote it, with the scales that PEFT gives its layers.

    NaNs are read as they are.  Raises DataError for what is no LoRA adapter, for pickles, for
    links that lead out, and for tensors and settings that do not fit each other.
    """
    path = _inside(folder, CONFIG)
    config = _config(path)
    tensors = _tensors(folder)
    pairs: dict[str, dict[str, Stored]] = {}
    saved: dict[str, Stored] = {}
    further: dict[str, Stored] = {}
    base_layers: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _MATRIX.fullmatch(name):
            pairs.setdefault(match["name"], {})[match["matrix"]] = tensor
        elif _FURTHER.search(name):
            further[name] = tensor
        elif name.endswith(".base_layer.weight"):
            base_layers[name] = tensor
        else:
            saved[name] = tensor
    if not pairs:
        raise DataError(f"{folder / WEIGHTS} has no lora_A and lora_B; it holds no LoRA adapter")
    patterns = [key for setting in PATTERNS for key in config.get(setting) or ()]
    require_quick(patterns, list(pairs), f"{path}: {' or '.join(PATTERNS)}")
    targets = {name: _target(name, pair, config) for name, pair in sorted(pairs.items())}
    return LoraAdapter(config, targets, saved, further, base_layers)


def require_safe(folder: Path) -> None:
    """Raises DataError for a directory whose settings or weights are a pickle, lead out of it, or are not there."""
    _inside(folder, CONFIG)
    _inside(folder, WEIGHTS)


def pickles(folder: Path) -> list[str]:
    """Names of files in a directory that would run code when they are loaded."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)


def _target(name: str, pair: Mapping[str, Stored], config: Mapping[str, Any]) -> Target:
    embedding = any("embedding" in matrix for matrix in pair)
    wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if set(pair) != set(wanted):
        raise DataError(f"{name} has {_listed(pair)} alone; the file is incomplete: save the adapter again")
    a, b = (pair[matrix] for matrix in wanted)
    kind: Kind = "embedding" if embedding else "convolution" if len(a.shape) > 2 else "linear"
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or not {a.dtype, b.dtype} <= PRECISIONS.keys():
        raise DataError(f"{name}: lora_A is {_shown(a)} and lora_B {_shown(b)}; they are no matrices of one kind")
    if not all((*a.shape[1:], b.shape[0], *b.shape[2:])):
        raise DataError(f"{name}: lora_A is {_shown(a)} and lora_B {_shown(b)}; a module takes and gives something")
    if a.shape[0] != b.shape[1]:
        raise DataError(f"{name}: lora_A is {_shown(a)} and lora_B {_shown(b)}; their ranks differ")
    rank, scale = scale_of(name, config)
    if a.shape[0] not in (rank, 0):
        raise DataError(
            f"{name}: lora_A is {_shown(a)}, and {CONFIG} says rank {rank}; weights and settings are of two adapters"
        )
    dtype = a.dtype if a.dtype == b.dtype else "F32" if "F64" not in (a.dtype, b.dtype) else "F64"
    return Target(a.numbers(), b.numbers(), scale, kind, dtype)


def _config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes, which is no adapter's settings")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise DataError(f"{path}: peft_type is {kind!r}, and only 'LORA' can be read")
    for setting in PATTERNS:
        pattern = config.get(setting) or {}
        if not isinstance(pattern, dict):
            raise DataError(f"{path}: {setting} is {pattern!r}; it must map names to numbers")
        for key, value in pattern.items():
            _require_number(path, f"{setting}[{key!r}]", value)
    for setting, value in (("r", config.get("r")), ("lora_alpha", config.get("lora_alpha", 8))):
        _require_number(path, setting, value)
    for setting in _TEXTS:
        if not isinstance(config.get(setting), str | None):
            raise DataError(f"{path}: {setting} is {config[setting]!r}; it must be text")
    if config["r"] < 1:
        raise DataError(f"{path}: r is {config['r']}; it must be at least 1")
    for rank in (config["r"], *(config.get("rank_pattern") or {}).values()):
        if not isinstance(rank, int):
            raise DataError(f"{path}: the rank {rank} is no whole number")
    return config


def _require_number(path: Path, setting: str, value: Any) -> None:
    # No comparison with a NaN is true.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise DataError(f"{path}: {setting} is {value!r}; it must be a number")


def _tensors(folder: Path) -> dict[str, Stored]:
    path = _inside(folder, WEIGHTS)
    try:
        tensors = read_tensors(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}); save the adapter again") from None
    for key in tensors:
        if not key.startswith(PREFIX):
            raise DataError(f"{path}: the tensor {key!r} is none of PEFT's, whose names begin with {PREFIX!r}")
        if len(key) > _LONGEST_NAME or not all(re.fullmatch(r"[\w-]+", part, re.ASCII) for part in key.split(".")):
            raise DataError(f"{path}: the tensor {key!r} names no module")
    return tensors


def _inside(folder: Path, name: str) -> Path:
    """A file of the directory that really lies in it."""
    path = folder / name
    if not folder.is_dir():
        raise DataError(f"{folder} is no directory; give the one that holds {CONFIG}")
    if not path.exists():
        unsafe = pickles(folder)
        if name == WEIGHTS and unsafe:
            raise DataError(
                f"{folder} has its weights as {unsafe[0]}, a pickle, which can run code and is not opened; load the "
                "adapter with PEFT where you trust it, and save it with save_pretrained"
            )
        raise DataError(f"{folder} has no {name}; it is no adapter that PEFT saved")
    real, home = path.resolve(), folder.resolve()
    # A hub cache's snapshots/REVISION/ holds links into its blobs/.
    allowed = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_file() or real.parent not in (home, allowed):
        raise DataError(f"{path} leads to {real}, out of its directory; copy the file there")
    return path


def _shown(tensor: Stored) -> str:
    return f"{' × '.join(map(str, tensor.shape))} {tensor.dtype}"


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
