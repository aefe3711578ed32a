"""A run directory: one run, one process at a time."""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from itertools import chain, count
from pathlib import Path
from shlex import quote

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tsqlora.errors import DataError, SettingsError, TsqLoraError
from tsqlora.libs.hub import DatasetName

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
SCORES_FILE = "scores.parquet"
ADAPTER_DIR = "adapter"
CHECKPOINT_DIR = "checkpoints"
LOCK_FILE = "run.lock"

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_TORCH_WRITES = ("PytorchStreamWriter failed writing", "inline_container.cc", "iostream error")


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / CONFIG_FILE).is_file()


def first_scores(path: Path) -> Path:
    """File of the first look's scores, once a second look has others."""
    return path.with_name(f"{path.stem}-1{path.suffix}")


def adapter_folder(path: Path) -> Path:
    """Where the adapter lies: of a run in its own folder, else in the directory itself.

    Raises DataError for a run that has none yet.
    """
    if not is_run(path):
        return path
    if not (path / ADAPTER_DIR).is_dir():
        raise DataError(
            f"the run in {path} has no adapter yet; `tsqlora train {quote(str(path))} --resume` continues it"
        )
    return path / ADAPTER_DIR


@contextmanager
def locked(run: Path, *, resume: bool = False) -> Iterator[None]:
    """Makes the directory and holds its lock, which dies with the process.

    Raises SettingsError where another process holds it, where the directory cannot be made or named,
    and as `require_free` does.
    """
    try:
        str(run.absolute()).encode()
    except UnicodeEncodeError:
        raise SettingsError(
            f"--out {str(run)!a} is no name in this locale's encoding; set PYTHONUTF8=1, or name another directory"
        ) from None
    # Nothing is written into a directory of something else, not even the lock.
    if not os.path.exists(run / LOCK_FILE):  # also False if the path cannot be read, which the next line reports
        require_free(run, resume=resume)
    with alone_in(run, busy=f"another process is training into {run}; wait for it, or name another --out"):
        require_free(run, resume=resume)
        yield


@contextmanager
def alone_in(folder: Path, *, busy: str) -> Iterator[None]:
    """Makes the folder and holds its lock, which dies with the process.

    Where nothing was written into it, nothing stays that was not there before: no lock, no folder, none above it.
    Raises SettingsError where it cannot be made, and `busy` where another process holds it.
    """
    new = [path for path in (folder / LOCK_FILE, folder, *folder.parents) if not os.path.lexists(path)]
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise SettingsError(busy) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            if not (folder / LOCK_FILE).exists():  # it is the directory that takes no file
                raise SettingsError(f"--out {folder} cannot be written ({reason}); name another directory") from None
            warnings.warn(  # as on Lustre without its flock option
                f"{folder} is on a file system without locks ({reason}): make sure that no other process uses it",
                stacklevel=3,
            )
        yield
    finally:
        if folder / LOCK_FILE in new and not _has_files(folder):
            with suppress(OSError):  # on Windows filelock itself removes it
                (folder / LOCK_FILE).unlink()  # while it is held: filelock passes over a lock without a name
        lock.release()
        for path in new:  # inner ones first, and what is in them, as far as there is no file in them
            if path.is_dir() and not _has_files(path) and not (path / LOCK_FILE).exists():
                shutil.rmtree(path, ignore_errors=True)


def _has_files(folder: Path) -> bool:
    """Whether anything but empty directories lies beside the lock."""
    return any(not path.is_dir() for path in folder.rglob("*") if path != folder / LOCK_FILE)


@contextmanager
def written(run: Path) -> Iterator[None]:
    """Raises TsqLoraError, with the cure, if the disk refuses a write."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if isinstance(error, OSError):
            why = error.strerror if error.errno in _REFUSALS else None
        # safetensors and torch write from Rust and C++; torch reports only where in its code it failed.
        elif any(words in text for words in _TORCH_WRITES):
            why = f"a file was cut off ({shutil.disk_usage(run).free:,} bytes are free)"
        else:
            why = next((os.strerror(number) for number in _REFUSALS if f"os error {number})" in text), None)
        name = getattr(error, "filename", None)  # not every error names its file
        elsewhere = name is not None and not Path(os.fsdecode(name)).absolute().is_relative_to(run.absolute())
        if why is None or elsewhere:
            raise
        raise TsqLoraError(
            f"{run} cannot be written: {why}; free some space or fix the rights, then the same command with "
            "--resume continues from the last complete checkpoint"
        ) from error


def dated(source: str, *, resume: bool = False, under: Path = Path("runs")) -> Path:
    """The directory of a run that was given none: DATE-NAME by the file or data set that it is of.

    One that is taken is passed over: DATE-NAME-2, and so on. With `resume` the newest one of NAME, where there is one.
    """
    hub = DatasetName.of(source)
    stem = Path(source).stem if hub.id == source else hub.id.rpartition("/")[2]
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"
    pattern = re.compile(rf"(\d{{4}}-\d\d-\d\d)-{re.escape(name)}(?:-(\d+))?")
    there = (pattern.fullmatch(path.name) for path in under.glob("*"))
    begun = {(match[1], int(match[2] or 1)): match[0] for match in there if match and is_run(under / match[0])}
    if resume and begun:
        return under / begun[max(begun)]
    first = under / f"{date.today().isoformat()}-{name}"
    later = (first.with_name(f"{first.name}-{number}") for number in count(2))
    for path in chain([first], later):
        with suppress(SettingsError):
            require_free(path)
            return path
    raise AssertionError


def require_free(run: Path, *, resume: bool = False) -> None:
    """Raises SettingsError if the directory holds a run that is not to be resumed, or something else, or is no name."""
    try:
        begun = (run / CONFIG_FILE).exists()
        strangers = []
        for path in sorted([] if begun or not run.is_dir() else run.iterdir()):
            # A run that ended before its settings were written leaves its first look's scores and its record behind,
            # whose lock shows that they are ours, and TensorBoard's files in the folder of checkpoints.
            ours = path.name.lstrip(".").startswith((RECORD_FILE, CONFIG_FILE, SCORES_FILE))
            left = path.name == LOCK_FILE or (ours and path.with_name(LOCK_FILE).exists())
            if path.name == CHECKPOINT_DIR:
                left = not any(path.glob("checkpoint-*"))
            strangers += [] if left else [path.name]
    except OSError as error:
        raise SettingsError(f"--out {run} cannot be read ({error.strerror}); name another directory") from None
    if begun:
        if not resume:
            raise SettingsError(f"{run} holds another run; give --resume to continue it, or name another --out")
        return
    if strangers and (run / LOCK_FILE).exists():
        raise SettingsError(
            f"{run} has no {CONFIG_FILE}, and {strangers[0]} of a run; put it back, or name another --out"
        )
    if strangers:
        raise SettingsError(f"{run} is not empty ({strangers[0]}); name another --out")
