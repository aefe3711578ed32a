"""Out of memory: the same work, in smaller micro batches."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch

from tsqlora.compat.accelerate import clear_device_cache, says_out_of_memory
from tsqlora.errors import TsqLoraError

R = TypeVar("R")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, of an accelerator or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # oneDNN, which computes on processors, does not say more.
    return isinstance(error, RuntimeError) and (says_out_of_memory(error) or "could not create a" in str(error))


def halves(rows: int) -> list[int]:
    """Micro batch sizes to try in turn.

    >>> halves(13)
    [13, 6, 3, 1]
    """
    return [rows] if rows <= 1 else [rows, *halves(rows // 2)]


def even_parts(rows: int) -> list[int]:
    """The same where every part must have as many rows: each a divisor, at most half of the one before.

    >>> even_parts(16), even_parts(12), even_parts(15), even_parts(7)
    ([16, 8, 4, 2, 1], [12, 6, 3, 1], [15, 5, 1], [7, 1])
    """
    return [rows] if rows <= 1 else [rows, *even_parts(max(d for d in range(1, rows // 2 + 1) if rows % d == 0))]


def retry_on_oom(work: Callable[[int], R], sizes: Iterable[int], *, smaller: Callable[[int], None] | None = None) -> R:
    """What `work` gives with the first of these micro batch sizes that fits; `smaller` is called before a retry.

    Raises TsqLoraError where the last one does not fit.
    """
    for place, size in enumerate(sizes):
        if place:
            # Not before the error is let go of: it holds what was allocated.
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
        f"memory does not suffice for one row at a time ({why}); lower data.max_length, or use a smaller model or dtype"
    )


class BatchSplitter:
    """Splits batches into parts that fit in memory; a size that did not fit once is not tried again."""

    def __init__(self) -> None:
        self.most: int | None = None
        """Rows of a part; None while whole batches fit."""

    def of(self, batch: np.ndarray, work: Callable[[np.ndarray], R]) -> list[R]:
        """What `work` gives of each part of the batch's row numbers, in order."""
        done, results = 0, list[R]()
        while done < len(batch):
            rest = batch[done : done + (self.most or len(batch))]

            def first_part(size: int, rest: np.ndarray = rest) -> tuple[int, R]:
                return size, work(rest[:size])

            size, result = retry_on_oom(first_part, halves(len(rest)), smaller=self._remember)
            results.append(result)
            done += size
        return results

    def _remember(self, size: int) -> None:
        self.most = size
