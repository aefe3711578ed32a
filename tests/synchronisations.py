"""Counts what waits for a device: a tensor's number is taken (`.item()`, `bool()`, `float()`)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TAKES_A_NUMBER = torch.ops.aten._local_scalar_dense.default


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _TAKES_A_NUMBER:
            self.callers.append(_caller())
        return function(*args, **(kwargs or {}))


def _caller() -> str:
    """File and line outside of torch and of this file."""
    frame = sys._getframe(1)
    while "/torch/" in (name := frame.f_code.co_filename) or name == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{name}:{frame.f_lineno}"


@contextmanager
def waits_of_ours() -> Iterator[list[str]]:
    """While open, the list grows by each place in tsqlora's source that waits for the device."""
    ours: list[str] = []
    counter = _Counter()
    counter.callers = ours
    with counter:
        yield ours
    ours[:] = [caller for caller in ours if "/src/tsqlora/" in caller]
