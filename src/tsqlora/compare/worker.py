"""Work in a process of its own, which dies with its parent and gives back all its memory."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tsqlora.errors import TsqLoraError
from tsqlora.progress import Progress

PATIENCE = 5.0
"""Seconds in which a process ends by itself once nobody listens, its workers with it; else it is killed."""


def in_own_process(name: str, work: Callable[..., Any], progress: Progress | None = None) -> Any:
    """The result of `work` in a new process: its peak of memory is its own, and no cell sees another's leftovers.

    With `progress`, `work` is called with a `progress` that reports to it. Errors of `work` are raised here.
    """
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
    """The result from the other end; progress is passed on, an error raised."""
    while True:
        kind, content = child.recv()
        if kind == "progress" and progress is not None:
            progress(*content)
        if kind == "found":
            return content
        if kind == "error":
            raise content


def _serve(parent: Connection, work: Callable[..., Any], watched: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    # Workers that load rows begin as in any training; of a server of their own each would import everything anew.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        options = {"progress": lambda *at: parent.send(("progress", at))} if watched else {}
        parent.send(("found", work(**options)))
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
