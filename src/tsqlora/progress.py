"""How far work is: what long functions report to, a terminal or a test."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Pulse:
    """How training goes, as of one step: what is not known is None."""

    loss: float | None
    learning_rate: float
    rows_a_second: float | None
    tokens_a_second: float | None
    moved: int
    """Slots that have gone from one layer to another."""
    memory: int
    """Bytes at the peak: of the GPU where torch has CUDA, else of the process."""


@runtime_checkable  # for beartype, which checks annotations while tests run
class Progress(Protocol):
    """Is told how much of a phase is done, in steps or rows; while training also how that goes."""

    def __call__(self, phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None: ...
