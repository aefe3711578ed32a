"""A run directory: one run, one process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqlora.errors import SettingsError
from tsqlora.record import RECORD_FILE

CONFIG_FILE = "config.yaml"
ADAPTER_DIR = "adapter"
CHECKPOINT_DIR = "checkpoints"
LOCK_FILE = "run.lock"


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / CONFIG_FILE).is_file()


def adapter_folder(path: Path) -> Path:
    """Where the adapter lies: of a run in its own folder, else in the directory itself."""
    return path / ADAPTER_DIR if is_run(path) else path


@contextmanager
def locked(run: Path, *, resume: bool = False) -> Iterator[None]:
    """Makes the directory and holds its lock, which dies with the process.

    Raises SettingsError where another process holds it, where the directory cannot be made,
    and as `require_free` does.
    """
    # Nothing is written into a directory of something else, not even the lock.
    if not (run / LOCK_FILE).exists():
        require_free(run, resume=resume)
    with alone_in(run, busy=f"another process is training into {run}; wait for it, or name another --out"):
        require_free(run, resume=resume)
        yield


@contextmanager
def alone_in(folder: Path, *, busy: str) -> Iterator[None]:
    """Makes the folder and holds its lock, which dies with the process.

    Raises SettingsError where it cannot be made, and `busy` where another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # "a": a finished run's lock is not even touched.
        file = open(folder / LOCK_FILE, "a")  # noqa: SIM115  (closed below; closing gives the lock back)
    except OSError as error:
        raise SettingsError(f"--out {folder} cannot be written ({error.strerror}); name another directory") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(busy) from None
        yield


def require_free(run: Path, *, resume: bool = False) -> None:
    """Raises SettingsError if the directory holds a run that is not to be resumed, or something else."""
    if (run / CONFIG_FILE).exists():
        if not resume:
            raise SettingsError(f"{run} holds another run; give --resume to continue it, or name another --out")
        return
    strangers = sorted(path.name for path in run.iterdir() if not _left_before_the_start(path)) if run.is_dir() else []
    if strangers:
        raise SettingsError(f"{run} is not empty ({strangers[0]}); name another --out")


def _left_before_the_start(path: Path) -> bool:
    """Whether a run that ended before its settings were written leaves this behind."""
    if path.name == CHECKPOINT_DIR:
        return not any(path.iterdir())
    # The record is written just before them; only a run of ours has a lock.
    ours = path.name.lstrip(".").startswith((RECORD_FILE, CONFIG_FILE))
    return path.name == LOCK_FILE or (ours and path.with_name(LOCK_FILE).exists())
