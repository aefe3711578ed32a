"""Run a function in a separate process, which ends with its parent and returns all its memory."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tsqlora.errors import TsqLoraError
from tsqlora.progress import Progress

PATIENCE = 5.0
"""Seconds for a process and its workers to end by themselves; then they are killed."""


def in_own_process(
    name: str, work: Callable[..., Any], progress: Progress | None = None, *, device: str | None = None
) -> Any:
    """Return the result of `work` from a new process, so that peak memory and leftovers stay apart.

    With `progress`, `work` gets a `progress` argument that reports here. Errors of `work` are raised here. It sees
    the GPU `device` alone, if one is named.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tsqlora.compare.preload"])
    ours, theirs = context.Pipe()
    # Not a daemon: daemons cannot have DataLoader workers. The process ends anyway once `ours` is closed.
    process = context.Process(target=_serve, args=(theirs, work, progress is not None, device), daemon=False)
    try:
        process.start()
        theirs.close()
        try:
            return _receive(ours, progress)
        except EOFError:
            process.join()
            raise TsqLoraError(f"{name}: its process ended with code {process.exitcode}; out of memory?") from None
    finally:
        ours.close()
        if process.pid is not None:  # None if Ctrl-C came before the process started
            process.join(PATIENCE)
            process.kill()
            process.join()


def _receive(child: Connection, progress: Progress | None) -> Any:
    """Wait for the result; forward progress and raise errors on the way."""
    while True:
        kind, content = child.recv()
        if kind == "progress" and progress is not None:
            progress(*content)
        if kind == "result":
            return content
        if kind == "error":
            raise content


def _serve(parent: Connection, work: Callable[..., Any], watched: bool, device: str | None) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before anything asks for a GPU
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    # DataLoader workers start as in any training; under forkserver each would import every library again.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        options = {"progress": lambda *at: parent.send(("progress", at))} if watched else {}
        parent.send(("result", work(**options)))
    except Exception as error:
        parent.send(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error, or its text where it does not pass between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TsqLoraError(f"{type(error).__name__}: {error}")
    return error


def _die_with(parent: Connection) -> None:
    # The parent sends nothing: the pipe ends when the parent does.
    try:
        parent.recv()
    except (EOFError, OSError):
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)
