"""Time that grows no faster than the rows."""

import time
from collections.abc import Callable
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def assert_linear(spent: Callable[[int], float], count: int) -> None:
    """Twice `count` rows take at most two and a half times the seconds.

    Times on a busy machine differ by a third; of a quadratic loop none of three ratios is below 2.5.
    """
    assert any(spent(2 * count) <= 2.5 * spent(count) for _ in range(3))
