"""Out-of-memory handling: repeat the same work in smaller micro batches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from tsqlora.errors import TsqLoraError
from tsqlora.libs.accelerate import clear_device_cache, says_out_of_memory

R = TypeVar("R")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the machine ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # oneDNN, which computes on CPUs, reports no more than this.
    return isinstance(error, RuntimeError) and (says_out_of_memory(error) or "could not create a" in str(error))


def halves(rows: int) -> list[int]:
    """Return the micro batch sizes to try in turn.

    >>> halves(13)
    [13, 6, 3, 1]
    """
    return [rows] if rows <= 1 else [rows, *halves(rows // 2)]


def even_parts(rows: int) -> list[int]:
    """Return micro batch sizes that split the rows evenly: each a divisor, at most half of the one before.

    >>> even_parts(16), even_parts(12), even_parts(15), even_parts(7)
    ([16, 8, 4, 2, 1], [12, 6, 3, 1], [15, 5, 1], [7, 1])
    """
    return [rows] if rows <= 1 else [rows, *even_parts(max(d for d in range(1, rows // 2 + 1) if rows % d == 0))]


def retry_on_oom(work: Callable[[int], R], sizes: Iterable[int], *, smaller: Callable[[int], None] | None = None) -> R:
    """Return `work(size)` for the first micro batch size that fits; call `smaller(size)` before each retry.

    Raises TsqLoraError where even the last size does not fit.
    """
    for place, size in enumerate(sizes):
        if place:
            # Only after the except block: the error holds the allocated tensors.
            clear_device_cache(garbage_collection=True)
            if smaller is not None:
                smaller(size)
        try:
            return work(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise TsqLoraError(
        f"out of memory with one row at a time ({why}); lower data.max_length, or use a smaller model or dtype"
    )


class BatchSplitter:
    """Splits batches into parts that fit in memory, and never retries a size that did not fit."""

    def __init__(self) -> None:
        self.most: int | None = None
        """Rows per part; None while whole batches fit."""

    def of(self, batch: np.ndarray, work: Callable[[np.ndarray], R]) -> list[R]:
        """Apply `work` to consecutive parts of the batch's row numbers, in order."""
        done, results = 0, list[R]()
        while done < len(batch):
            rest = batch[done : done + (self.most or len(batch))]

            def first_part(size: int, rest: np.ndarray = rest) -> tuple[int, R]:
                return size, work(rest[:size])

            size, result = retry_on_oom(first_part, halves(len(rest)), smaller=partial(setattr, self, "most"))
            results.append(result)
            done += size
        return results
