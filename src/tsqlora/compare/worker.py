"""A cell in a process of its own, which dies with its parent and gives back all its memory."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from tsqlora.compare.cells import Cell
from tsqlora.config import Config
from tsqlora.errors import TsqLoraError
from tsqlora.progress import Progress


def in_own_process(
    config: Config, cell: Cell, *, equal: str, seconds: float | None, progress: Progress | None
) -> dict[str, Any]:
    """As `run_cell`, in a new process: its peak of memory is its own, and no cell sees what another left behind."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tsqlora.compare.preload"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, config, cell, equal, seconds), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, told = ours.recv()
            if kind == "progress" and progress is not None:
                progress(*told)
            if kind == "found":
                return told
            if kind == "error":
                raise told
    except EOFError:
        process.join()
        raise TsqLoraError(f"{cell.name}: its process ended with code {process.exitcode}; was memory short?") from None
    finally:
        ours.close()
        process.kill()
        process.join()


def _serve(parent: Connection, config: Config, cell: Cell, equal: Any, seconds: float | None) -> None:
    from tsqlora.compare.run import run_cell

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        found = run_cell(config, cell, equal=equal, seconds=seconds, progress=lambda *at: parent.send(("progress", at)))
        parent.send(("found", found))
    except Exception as error:
        parent.send(("error", error))


def _die_with(parent: Connection) -> None:
    """Nothing is ever received: the end of the pipe is the parent's end."""
    try:
        parent.recv()
    except (EOFError, OSError):
        os._exit(1)
