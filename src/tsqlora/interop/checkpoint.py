"""The checkpoint that an adapter is for, without its weights: where it is, and which modules its files have."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tsqlora.compat.hub import is_hub_id, is_revision
from tsqlora.errors import SettingsError
from tsqlora.interop.lora import LoraAdapter

_MOST_CONFIG_BYTES = 1 << 24


def base_path(adapter: LoraAdapter, given: str | None) -> str:
    """Where the base is: what the user says, else what the adapter names.  Raises SettingsError if that is nowhere."""
    if given is not None:
        return given
    named = adapter.base or ""
    # The name is whoever wrote the adapter's: it may not walk about in this machine's files.
    # os.path: pathlib raises for names that no file can have.
    if ".." in Path(named).parts or not (os.path.isdir(named) or is_hub_id(named)):
        raise SettingsError(f"the adapter's base model ({named!r}) is not here; give --base, a directory or a hub id")
    return named


def revision_of(path: str, adapter: LoraAdapter) -> str:
    """Of the base that the adapter names, the revision that it names; of another, and by default, main.

    Raises SettingsError for one that is none.
    """
    named = adapter.config.get("revision") if path == adapter.base else None
    if named is not None and not is_revision(named):
        raise SettingsError(f"the adapter names {named!r} as its base's revision, which is none; give --base")
    return named or "main"


def base_config(folder: str) -> dict[str, Any]:
    """The base's config.json; empty where there is none that can be read."""
    path = Path(folder, "config.json")
    try:
        read = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MOST_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def base_weights(folder: str, targets: Collection[str]) -> dict[str, tuple[int, ...]] | None:
    """The shape of each module's weight by the module's name, from the headers of the base's safetensors files.

    A checkpoint of a body lacks the prefix that the body has beneath a head, or has one too many: the names come as the
    adapter's targets have them. None where the files are not there, or have no such modules.
    """
    found: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    module, _, leaf = key.rpartition(".")
                    if leaf == "weight":
                        found[module] = tuple(file.get_slice(key).get_shape())
    except (OSError, SafetensorError):
        return None
    first = next(iter(targets)).partition(".")[0]
    for renamed in (
        found,
        {f"{first}.{name}": shape for name, shape in found.items()},
        {name.partition(".")[2]: shape for name, shape in found.items()},
    ):
        if all(name in renamed for name in targets):
            return renamed
    return None
