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
    """Twice the rows take at most two and a half times the seconds: four times `count` rows 6.25 times.

    Times on a busy machine differ by a third; of a quadratic loop, which takes 16 times, none of three is below that.
    """
    ratios = list[float]()
    while len(ratios) < 3 and (not ratios or ratios[-1] > 2.5**2):
        ratios.append(spent(4 * count) / spent(count))
    assert ratios[-1] <= 2.5**2, ratios
