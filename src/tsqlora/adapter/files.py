"""Read and write adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

The reader trusts nothing: it opens no pickle, follows no link out of the directory (except a hub cache's own), and
runs no code.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tsqlora.adapter.config import plain_config, read_config
from tsqlora.adapter.lora import Kind, LoraAdapter, Target
from tsqlora.adapter.patterns import PATTERNS, lora_config, require_quick, scale_of
from tsqlora.adapter.tensors import PRECISIONS, Stored, read_tensors, store, to_bytes
from tsqlora.errors import DataError, SettingsError, UnsupportedError, first_line
from tsqlora.files import parents_of, reading, replacing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_MATRIX = re.compile(r"(?P<name>.+)\.(?P<matrix>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_KEY = re.compile(rf"{re.escape(PREFIX)}[\w-]+(\.[\w-]+)*", re.ASCII)
_MATRICES = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
_NAMED = re.compile(r"\.lora_[AB]\.[\w-]+\.weight$", re.ASCII)
"""PEFT adds the name of the adapter when it loads a file, and has none in it."""
_LONGEST_NAME = 500
_FURTHER = re.compile(r"\.(lora_\w+|token_adapter|trainable_tokens_\w+)(\.|$)")


def read_adapter(folder: Path) -> LoraAdapter:
    """Read the adapter in a directory, with the scales that PEFT gives its layers.

    NaNs are read as they are.  Raises DataError if it is no LoRA adapter, for pickles and links that leave the
    directory, and for tensors and settings that do not fit each other.
    """
    path = _inside(folder, CONFIG)
    config, ignored = read_config(path)
    tensors = _tensors(folder)
    pairs: dict[str, dict[str, Stored]] = {}
    others: dict[str, dict[str, Stored]] = {"saved": {}, "further": {}, "base_layers": {}}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _MATRIX.fullmatch(name):
            pairs.setdefault(match["name"], {})[match["matrix"]] = tensor
        else:
            copied = "base_layers" if name.endswith(".base_layer.weight") else "saved"
            others["further" if _FURTHER.search(name) else copied][name] = tensor
    if not pairs and (named := next((key for key in tensors if _NAMED.search(key)), None)):
        raise DataError(
            f"{folder / WEIGHTS}: no key matches the base in PEFT: {named} has an adapter's name in it, as in a "
            "state_dict; save the adapter with the PEFT model's save_pretrained, or cut the name out of the keys"
        )
    if not pairs:
        raise DataError(f"{folder / WEIGHTS} has no lora_A and lora_B, so it is not a LoRA adapter")
    patterns = [key for setting in PATTERNS for key in config.get(setting) or ()]
    require_quick(patterns, list(pairs), f"{path}: {' or '.join(PATTERNS)}")
    for name in [name for name, pair in pairs.items() if _of_experts(pair, config)]:
        others["further"] |= {f"{name}.{matrix}": tensor for matrix, tensor in pairs.pop(name).items()}
    targets = {name: _target(name, pair, config) for name, pair in sorted(pairs.items())}
    return LoraAdapter(config, targets, **others, ignored=ignored)


def pickles(folder: Path) -> list[str]:
    """Names of the files that can run code when they are loaded."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)


def _of_experts(pair: Mapping[str, Stored], config: Mapping[str, Any]) -> bool:
    """Whether A and B are those of all experts at once: PEFT stacks their ranks."""
    shapes = [pair[matrix].shape for matrix in _MATRICES["linear"] if matrix in pair]
    if not config.get("target_parameters") or len(shapes) < 2 or any(len(shape) != 2 for shape in shapes):
        return False
    (rank, _), (_, columns) = shapes
    return rank == columns > config["r"]


def _target(name: str, pair: Mapping[str, Stored], config: Mapping[str, Any]) -> Target:
    embedding = any("embedding" in matrix for matrix in pair)
    matrices = _MATRICES["embedding" if embedding else "linear"]
    if set(pair) != set(matrices):
        raise DataError(f"{name} has only {' and '.join(sorted(pair))}; save the adapter again")
    a, b = (pair[matrix] for matrix in matrices)
    if (0,) in (a.shape, b.shape):
        raise DataError(
            f"empty tensors: {name} has no numbers in its file, as DeepSpeed's ZeRO-3 leaves them; train with its "
            "stage3_gather_16bit_weights_on_model_save, or save the adapter from a checkpoint that zero_to_fp32 made"
        )
    if odd := sorted({a.dtype, b.dtype} - PRECISIONS.keys()):
        raise DataError(f"{name} is stored as {odd[0]}; save the adapter as one of {', '.join(PRECISIONS)}")
    rank, scale = scale_of(name, config)
    fit = (
        len(a.shape) == len(b.shape) >= 2
        and a.shape[0] == b.shape[1]
        and a.shape[0] in (rank, 0)
        and all((*a.shape[1:], b.shape[0], *b.shape[2:]))
    )
    if not fit:
        raise DataError(
            f"{name}: lora_A is {_shown(a)}, lora_B {_shown(b)} and the rank of {CONFIG} {rank}, which do not fit each "
            "other; save the adapter again"
        )
    kind: Kind = "embedding" if embedding else "convolution" if len(a.shape) > 2 else "linear"
    dtype = a.dtype if a.dtype == b.dtype else "F32" if "F64" not in (a.dtype, b.dtype) else "F64"
    return Target(a.numbers(), b.numbers(), scale, kind, dtype)


def _tensors(folder: Path) -> dict[str, Stored]:
    path = _inside(folder, WEIGHTS)
    try:
        tensors = read_tensors(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); save the adapter again") from None
    for key in tensors:
        if len(key) > _LONGEST_NAME or not _KEY.fullmatch(key):
            raise DataError(
                f"{path}: no key matches the base in PEFT: the tensor {key!r} is not {PREFIX!r} and the name of a "
                "module; save the adapter with the PEFT model's save_pretrained"
            )
    return tensors


def _inside(folder: Path, name: str) -> Path:
    """The path of a file, after checking that it lies in the directory."""
    path = folder / name
    reading(path)
    if not path.exists():
        unsafe = pickles(folder) if name == WEIGHTS else ()
        if unsafe:
            raise DataError(
                f"{folder} has its weights in {unsafe[0]}, a pickle, which can run code and is not opened; if you "
                "trust it, load the adapter with PEFT and save it with save_pretrained"
            )
        raise DataError(f"{folder} has no {name}; name the directory of an adapter that PEFT saved")
    _require_own(path, folder)
    return path


def require_inside(folder: Path) -> None:
    """Raise DataError if the directory has a link out of it: an export would copy what it leads to."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            _require_own(path, folder)


def _require_own(path: Path, folder: Path) -> None:
    if not is_own(path, folder):
        raise DataError(f"{path} links to {path.resolve()}, outside its directory; copy the file into it")


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file lies in the directory: no link leads out of it."""
    real, home = path.resolve(), folder.resolve()
    # A hub cache's snapshots/REVISION/ holds links into its blobs/.
    allowed = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return real.is_file() and real.parent in (home, allowed)


def _shown(tensor: Stored) -> str:
    return f"{' × '.join(map(str, tensor.shape))} {tensor.dtype}"


# ------------------------------------------------------------------------------------ writing


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` in the end, and is deleted after an error.

    Raises SettingsError if `out` is not empty or cannot be created.
    """
    require_new(out)
    out = Path(os.path.realpath(out))  # keep a link to a directory
    with ExitStack() as stack:
        try:
            stack.enter_context(parents_of(out))
            temporary = stack.enter_context(replacing(out))
            temporary.mkdir()
        except OSError as error:
            raise SettingsError(f"--out {out} cannot be written ({error.strerror}); name another directory") from None
        yield temporary


def require_new(out: Path) -> None:
    """Raise SettingsError if `out` exists and is not empty, or cannot be replaced."""
    real = os.path.realpath(out)
    fixed = os.path.ismount(real) or real == os.path.realpath(os.getcwd())
    if fixed or (os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))):
        raise SettingsError(f"--out {out} exists already; name a new directory, such as one in it")


def write_adapter(adapter: LoraAdapter, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing directory."""
    stored = {f"{PREFIX}{name}": tensor for name, tensor in tensors_of(adapter).items()}
    (folder / WEIGHTS).write_bytes(to_bytes(stored))
    (folder / CONFIG).write_text(json.dumps(dict(adapter.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_of(adapter: LoraAdapter) -> dict[str, Stored]:
    """All tensors of the adapter's file, by their names in the base model."""
    tensors = {**adapter.saved, **adapter.further, **adapter.base_layers}
    for name, target in adapter.targets.items():
        a, b = _MATRICES.get(target.kind, _MATRICES["linear"])
        tensors |= {f"{name}.{a}": store(target.a, target.dtype), f"{name}.{b}": store(target.b, target.dtype)}
    return tensors


def config_for(adapter: LoraAdapter) -> dict[str, Any]:
    """The adapter's config with the names, ranks and scales of its targets.

    Raises UnsupportedError for an adapter of experts' parameters, which are no modules.
    """
    if adapter.experts():
        raise UnsupportedError(
            "the adapter changes parameters of experts (target_parameters), which tsqlora does not rewrite; merge it "
            "with PEFT's merge_and_unload, and serve the merged model"
        )
    ranks, scales = ({name: getattr(t, key) for name, t in adapter.targets.items()} for key in ("rank", "scale"))
    literal = lora_config(ranks, scales)  # names in place of patterns
    return plain_config(
        adapter.config, **literal, modules_to_save=adapter.whole() or None, target_parameters=None, bias=adapter.bias
    )
