"""An adapter -> a directory in PEFT's format, whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsqlora.errors import SettingsError
from tsqlora.files import replacing
from tsqlora.interop.files import CONFIG, PREFIX, WEIGHTS
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.patterns import lora_config
from tsqlora.interop.tensors import Stored, store, to_bytes

_MATRICES = {"embedding": ("lora_embedding_A", "lora_embedding_B")}


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place in the end, and is gone after an error.

    Raises SettingsError where `out` holds something, or cannot be made.
    """
    require_new(out)
    out = Path(os.path.realpath(out))  # a link to a directory stays
    with replacing(out) as temporary:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise SettingsError(f"--out {out} cannot be written ({error.strerror}); name another directory") from None
        yield temporary


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
    stored = {f"{PREFIX}{name}": tensor for name, tensor in tensors_of(adapter).items()}
    (folder / WEIGHTS).write_bytes(to_bytes(stored))
    (folder / CONFIG).write_text(json.dumps(dict(adapter.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_of(adapter: LoraAdapter) -> dict[str, Stored]:
    """Everything that the file of an adapter holds, by its names in the base model."""
    tensors = {**adapter.saved, **adapter.further, **adapter.base_layers}
    for name, target in adapter.targets.items():
        a, b = _MATRICES.get(target.kind, ("lora_A.weight", "lora_B.weight"))
        tensors |= {f"{name}.{a}": store(target.a, target.dtype), f"{name}.{b}": store(target.b, target.dtype)}
    return tensors


def config_for(adapter: LoraAdapter) -> dict[str, Any]:
    """The adapter's config with the ranks and scales that its targets have."""
    targets = adapter.targets.items()
    scales = {name: target.scale for name, target in targets}
    return plain_config(adapter.config, **lora_config({name: target.rank for name, target in targets}, scales))


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
