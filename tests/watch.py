"""One case given to a reader, watched: what it did to the machine, what it raised, how long it took."""

import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile import Case, lay
from tsqlora.errors import TsqLoraError

SECONDS = 1.0
"""Of the processor, that a case may take."""
_STUCK = 4
"""Seconds of the processor after which a case is cut off."""
_OF_FILES = ("remove", "rename", "mkdir", "rmdir", "link", "symlink", "chmod", "truncate", "utime")
_CHANGES = tuple(f"os.{change}" for change in _OF_FILES)
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.getaddrinfo")
_NEVER += ("pickle.find_class", "pty.spawn")

_watched: list[tuple[Path, list[str]]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Python's audit events: files opened for writing or changed, processes, sockets, pickles."""
    if not _watched:
        return
    folder, seen = _watched[-1]
    if event == "open":
        path, mode, flags = args
        if isinstance(path, str) and os.path.isdir(path):  # a temporary file without a name, which no folder has
            return
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, (str, bytes)) and not _inside(path, folder):
            seen.append(f"opened {os.fsdecode(path)} for writing")
    elif (
        (event in _CHANGES and not all(_inside(arg, folder) for arg in args if isinstance(arg, (str, bytes))))
        or event in _NEVER
        or (event == "subprocess.Popen" and args[0] != sys.executable)
    ):
        seen.append(f"{event} {args}")


def _inside(path: str | bytes, folder: Path) -> bool:
    real = os.path.realpath(os.fsdecode(path))
    return real in (os.devnull, str(folder)) or real.startswith(f"{folder}{os.sep}")


sys.addaudithook(_hook)


@dataclass(frozen=True)
class Outcome:
    """`message` is the message of a refusal, or what is wrong with the reader; `broken` whether anything is."""

    kind: str
    message: str
    seconds: float

    @property
    def broken(self) -> bool:
        return self.kind not in ("read", "refused")


def attempt(run: Callable[[Path, Case], None], case: Case, folder: Path) -> Outcome:
    """Lays the case in the empty folder, runs the reader on it, and empties the folder again."""
    lay(case, folder)
    seen: list[str] = []
    start = time.process_time()
    _watched.append((folder.resolve(), seen))
    try:
        with warnings.catch_warnings(), _cut_off():
            warnings.simplefilter("ignore")
            run(folder, case)
        kind, message = "read", ""
    except TsqLoraError as error:
        kind, message = _refusal(str(error))
    except BaseException as error:  # a panic of Rust code is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        kind, message = "traceback", f"{type(error).__name__} in {_place(error)}: {error}"[:300]
    finally:
        _watched.pop()
    seconds = time.process_time() - start
    if seen:
        kind, message = "reached out", seen[0]
    elif seconds > SECONDS and kind != "traceback":
        kind, message = "hang", f"{seconds:.1f} s ({kind})"
    _empty(folder)
    return Outcome(kind, message, seconds)


def _refusal(message: str) -> tuple[str, str]:
    """A refusal that fits on a screen and has no control characters for the terminal."""
    if message.count("\n") > 1 or len(message) > 2000:
        return "long message", message[:200]
    return "refused", message


def _place(error: BaseException) -> str:
    """The innermost frame of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/tsqlora/" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"


@contextmanager
def _cut_off() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"cut off after {_STUCK} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _STUCK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
