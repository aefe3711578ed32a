"""A run directory: one run, one process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqlora.errors import SettingsError

CONFIG_FILE = "config.yaml"
ADAPTER_DIR = "adapter"
CHECKPOINT_DIR = "checkpoints"
LOCK_FILE = "run.lock"
COST_FILE = "tsqlora_cost.json"
"""The last file that is written into a checkpoint: one that has it is whole."""


@contextmanager
def locked(run: Path, *, resume: bool = False) -> Iterator[None]:
    """Makes the directory and holds its lock, which dies with the process.

    Raises SettingsError where another process holds it, where the directory cannot be made,
    and as `require_free` does.
    """
    # Nothing is written into a directory of something else, not even the lock.
    if not (run / LOCK_FILE).exists():
        require_free(run, resume=resume)
    try:
        run.mkdir(parents=True, exist_ok=True)
        # "a": a finished run's lock is not even touched.
        file = open(run / LOCK_FILE, "a")  # noqa: SIM115  (closed below; closing gives the lock back)
    except OSError as error:
        raise SettingsError(f"--out {run} cannot be written ({error.strerror}); name another directory") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another process is training into {run}; wait for it, or name another --out") from None
        require_free(run, resume=resume)
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


def last_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint with the most steps, if there is one."""
    whole = [path.parent for path in (run / CHECKPOINT_DIR).glob(f"checkpoint-*/{COST_FILE}")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _left_before_the_start(path: Path) -> bool:
    """Whether a run that failed before its first step leaves this behind."""
    return path.name == LOCK_FILE or (path.name == CHECKPOINT_DIR and not any(path.iterdir()))
