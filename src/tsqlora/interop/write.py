"""An adapter -> a directory in PEFT's format, whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tsqlora.errors import SettingsError
from tsqlora.interop.files import CONFIG, PREFIX, WEIGHTS
from tsqlora.interop.lora import LoraAdapter, Target

_MATRICES = {"embedding": ("lora_embedding_A", "lora_embedding_B")}


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place in the end, and is gone after an error.

    Raises SettingsError where `out` holds something, or cannot be made.
    """
    require_new(out)
    out = Path(os.path.realpath(out))  # a link to a directory stays
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of this number
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be written ({error.strerror}); name another directory") from None
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(out: Path) -> None:
    """Raises SettingsError where something is in the way, or nothing can take the directory's place."""
    there = os.path.realpath(out)
    if os.path.ismount(there) or there == os.path.realpath(os.getcwd()):
        what = "a mounted volume" if os.path.ismount(there) else "the working directory"
        raise SettingsError(f"--out {out} is {what}; name a directory in it")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise SettingsError(f"--out {out} exists already; name a directory that does not")


def write_adapter(adapter: LoraAdapter, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a directory that is there."""
    # A copy each: safetensors refuses tensors that share memory.
    stored = {f"{PREFIX}{name}": tensor.detach().clone().contiguous() for name, tensor in tensors_of(adapter).items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(adapter.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_of(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Everything that the file of an adapter holds, by its names in the base model."""
    tensors = {**adapter.saved, **adapter.further, **adapter.base_layers}
    for name, target in adapter.targets.items():
        a, b = _MATRICES.get(target.kind, ("lora_A.weight", "lora_B.weight"))
        tensors |= {f"{name}.{a}": target.a, f"{name}.{b}": target.b}
    return tensors


def plain_config(config: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """A config in which `target_modules` alone say what is adapted, and with which PEFT leaves the base's weights."""
    return {
        **config,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        **changed,
    }


def pattern_config(config: Mapping[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
    """A config that gives each target its rank and its scale by its full name: r, lora_alpha, patterns."""
    largest = max(targets.values(), key=lambda target: target.rank)
    alphas = {name: alpha_for(target.scale, target.rank) for name, target in targets.items()}
    r, alpha = largest.rank, alpha_for(largest.scale, largest.rank)
    return plain_config(
        config,
        r=r,
        lora_alpha=alpha,
        target_modules=sorted(targets),
        rank_pattern={_key(name, targets): target.rank for name, target in targets.items() if target.rank != r},
        alpha_pattern={_key(name, targets): alphas[name] for name in targets if alphas[name] != alpha},
    )


def alpha_for(scale: float, rank: int) -> float | int:
    """The lora_alpha that gives a scale, to the last bit of alpha / rank if there is one; whole numbers as int.

    >>> alpha_for(2.0, 8), alpha_for(0.3, 3) / 3
    (16, 0.3)
    """
    about = scale * rank
    alpha = next(
        (a for a in (about, math.nextafter(about, math.inf), math.nextafter(about, -math.inf)) if a / rank == scale),
        about,
    )
    return int(alpha) if alpha.is_integer() else alpha


def _key(name: str, names: Mapping[str, Any]) -> str:
    """The key of a module in PEFT's patterns: tied to the name's start where another name ends like it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
