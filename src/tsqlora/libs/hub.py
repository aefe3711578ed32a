"""Names of models and data sets on the hub, and their files in its cache."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError, SettingsError, TsqLoraError, first_line
from tsqlora.files import reading

_OF_MODELS = (
    "*config*.json",
    "*token*.json",
    "vocab.json",
    "*.index.json",
    "*.safetensors",
    "*.bin",
    "*.txt",
    "*.jinja",
)
"""Files of a model's directory; other files there, such as our ranks.json, are not the model's."""


def is_hub_id(name: str) -> bool:
    """Whether a name can be the id of a model or a data set: NAME or OWNER/NAME.

    >>> [is_hub_id(name) for name in ("gpt2", "org/model-1.0", "../x", "a/b/c", "a/..", "/etc", "https://x", "a--b")]
    [True, True, False, False, False, False, False, False]
    """
    from huggingface_hub.errors import HFValidationError  # loads an HTTP client
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def require_model(path: str) -> None:
    """Raise SettingsError unless `path` is a directory or can be a hub id, or if the command writes a file of it."""
    if os.path.isdir(path):
        for file in (file for pattern in _OF_MODELS for file in Path(path).glob(pattern)):
            reading(file)
    elif not is_hub_id(path):
        raise SettingsError(f"model.path {path!r}: no such directory; correct it, or give a hub id")


@contextmanager
def loading(option: str, path: str) -> Iterator[None]:
    """Raises SettingsError with the option, its path, and the first line of what a library says about that model."""
    try:
        yield
    except TsqLoraError:
        raise
    except Exception as error:  # a hostile config.json can make transformers raise anything
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it comes with its own code, which runs only with model.trust_remote_code: true"
        elif not os.path.isdir(path):
            as_id = f"there is no such directory, and as a hub id: {reason}"
            reason = as_id if is_hub_id(path) else "no such directory"
        raise SettingsError(
            f"{option} {path!r} cannot be loaded ({reason}); correct this, or give another directory or hub id"
        ) from error


def is_revision(name: str) -> bool:
    """Whether a name can be a branch, tag or commit, which becomes part of a path in the hub's cache.

    >>> [is_revision(name) for name in ("main", "refs/pr/1", "v1.0", "../../x", "/etc/passwd", "")]
    [True, True, True, False, False, False]
    """
    return all(re.fullmatch(r"[\w.+-]+", part, re.ASCII) and part.strip(".") for part in name.split("/"))


def cached_model(name: str, revision: str) -> str | None:
    """The directory of a model in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no name of the hub
        return None
    return os.path.dirname(config) if isinstance(config, str) else None


def download_adapter(name: str) -> Path:
    """Download the two files of an adapter, and return their directory in the hub's cache.  Raises DataError."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["adapter_config.json", "adapter_model.safetensors"]))
    except Exception as error:  # of the network, the login or the hub
        raise DataError(
            f"{name} is neither a local directory nor an adapter that the hub provides ({type(error).__name__}); give "
            "an adapter's directory, or its OWNER/NAME"
        ) from error
    if (folder / "adapter_config.json").exists() and not (folder / "adapter_model.safetensors").exists():
        raise DataError(
            f"{name} has no adapter_model.safetensors on the hub; adapter_model.bin is a pickle, which can run code "
            "and is not opened; if you trust it, load the adapter with PEFT and save it with save_pretrained"
        )
    return folder


def http_library() -> Any:
    """The HTTP client that huggingface_hub brings: httpx2, before its version 2 httpx."""
    return import_module("httpx2" if find_spec("httpx2") else "httpx")


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A data set of the hub: ID, ID:CONFIGURATION, ID[SPLIT] or ID:CONFIGURATION[SPLIT].

    >>> DatasetName.of("nyu-mll/glue:mrpc[train[:100]]")
    DatasetName(id='nyu-mll/glue', configuration='mrpc', split='train[:100]')
    """

    id: str
    configuration: str | None
    split: str | None

    @classmethod
    def of(cls, name: str) -> "DatasetName":
        match = re.fullmatch(r"([^:\[]+)(?::([\w.+-]+))?(?:\[(.+)\])?", name)
        return cls(name, None, None) if match is None else cls(*match.groups())
