"""Write files and directories atomically: a reader gets the old one or the new one, never a part."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqlora.errors import SettingsError

if TYPE_CHECKING:  # `tsqlora --help` waits neither for torch nor for numpy
    from torch import Tensor


_outputs: ContextVar[tuple[Path, ...]] = ContextVar("outputs", default=())


@contextmanager
def writing(*outputs: Path) -> Iterator[None]:
    """What a command is about to write: within, `reading` refuses these files."""
    token = _outputs.set(outputs)
    try:
        yield
    finally:
        _outputs.reset(token)


def reading(path: str | os.PathLike[str]) -> None:
    """Called before a user's file is read.  Raises SettingsError if the command writes it, also under another name."""
    for out in _outputs.get():
        if os.path.exists(path) and out.exists() and os.path.samefile(path, out):
            raise SettingsError(f"--out {out} would replace {path}, which the command reads; name another file")


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`: the file or directory that you write there replaces `path`.

    A file is synced to disk before it is renamed. After an error nothing remains, and `path` is unchanged. If `path` is
    a link, the file that it points to is replaced. A `private` file, which holds users' texts, is for its owner alone,
    or has the permissions of the file that it replaces.
    """
    target = Path(os.path.realpath(path))
    path = target if target.parent.is_dir() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(temporary)  # left by a killed process with this number
    try:
        if private:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        if private and path.is_file():
            temporary.chmod(path.stat().st_mode & 0o777)
        if temporary.is_file():
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        _remove(temporary)


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the directories above `path`; after an error remove those that are new and empty."""
    new = [folder for folder in path.parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file in UTF-8, as `replacing`."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, as `replacing`; numpy values become plain ones."""
    write_text(path, json.dumps(value, indent=2, default=plain_value) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write a safetensors file, as `replacing`."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_value(value: Any) -> Any:
    """Convert numpy scalars and arrays for `json.dumps(default=…)`."""
    import numpy as np

    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} is not a JSON value")


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder outlast a loss of power."""
    with suppress(OSError):  # some file systems, and Windows, refuse it, and the file is there all the same
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
