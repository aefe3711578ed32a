"""A cell in a process of its own, which dies with its parent and gives back all its memory."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.preflight import preflight
from tsqlora.compare.run import Equal, run_cell
from tsqlora.errors import TsqLoraError
from tsqlora.progress import Progress
from tsqlora.run.config import Config

PATIENCE = 5.0
"""Seconds in which a process ends by itself once nobody listens, its workers with it; else it is killed."""


def in_own_process(
    config: Config, cell: Cell, *, equal: Equal, seconds: float | None, progress: Progress | None
) -> dict[str, Any]:
    """As `run_cell`, in a new process: its peak of memory is its own, and no cell sees what another left behind."""
    return _apart(cell.name, partial(run_cell, config, cell, equal=equal, seconds=seconds), progress)


def checked_in_own_process(
    config: Config,
    entries: Sequence[Entry],
    seed: int,
    *,
    known: Sequence[int],
    equal: Equal,
) -> dict[int, str]:
    """As `preflight`, in a new process, so that no model stays in memory beside the cells."""
    return _apart("preflight", partial(preflight, config, entries, seed, known=known, equal=equal))


def _apart(name: str, work: Callable[..., Any], progress: Progress | None = None) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tsqlora.compare.preload"])
    ours, theirs = context.Pipe()
    # No daemon: that may not have the workers that load rows. It ends all the same as soon as `ours` is closed.
    process = context.Process(target=_serve, args=(theirs, work, progress is not None), daemon=False)
    try:
        process.start()
        theirs.close()
        try:
            return _answer(ours, progress)
        except EOFError:
            process.join()
            raise TsqLoraError(f"{name}: its process ended with code {process.exitcode}; was memory short?") from None
    finally:
        ours.close()
        if process.pid is not None:  # else Ctrl-C came before it began
            process.join(PATIENCE)
            process.kill()
            process.join()


def _answer(child: Connection, progress: Progress | None) -> Any:
    """What was found at the other end, whose progress is told on; its error is raised."""
    while True:
        kind, told = child.recv()
        if kind == "progress" and progress is not None:
            progress(*told)
        if kind == "found":
            return told
        if kind == "error":
            raise told


def _serve(parent: Connection, work: Callable[..., Any], watched: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    # Workers that load rows begin as in any training; of a server of their own each would import everything anew.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        told = {"progress": lambda *at: parent.send(("progress", at))} if watched else {}
        parent.send(("found", work(**told)))
    except Exception as error:
        parent.send(("error", error))


def _die_with(parent: Connection) -> None:
    """Nothing is ever received: the end of the pipe is the parent's end."""
    try:
        parent.recv()
    except (EOFError, OSError):
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)
