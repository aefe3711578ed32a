"""When ranks are adjusted, and how much may move then.

Warm-up (no change) → adjustment (every `interval` optimizer steps) → freeze.
"""

import math
from dataclasses import dataclass
from numbers import Integral

from tsqlora.errors import SettingsError

STEP_DIGITS = 9
"""Shares of a run are rounded to this many decimals first, else 0.07 of 100 steps would be 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSchedule:
    """When ranks move, how many at once, and how closely they follow sensitivity."""

    warmup: float = 0.1
    """The share of the run before the first adjustment."""
    freeze: float = 0.3
    """The share of the run after the last adjustment."""
    moves: int | None = None
    """Slots that may move in the first adjustment, falling to 0 as a cubic; a quarter of the layers if not given."""
    gamma: float = 1.0
    """Ranks follow sensitivity to this power; 0 keeps them uniform."""

    def steps(self, total: int, interval: int) -> range:
        """Numbers of completed optimizer steps after which a run of `total` steps adjusts ranks.

        The first is ⌈warmup · total⌉, but at least `interval`, so that importances exist;
        then every `interval` steps, all before (1 - freeze) · total. Empty if the run is too short. The range's own
        `stop` is where freezing begins.

        Raises SettingsError if a share or the interval is out of range.

        >>> list(RankSchedule(warmup=0.1, freeze=0.3).steps(100, 20))
        [20, 40, 60]
        """
        for name, share in (("warmup", self.warmup), ("freeze", self.freeze)):
            if not 0 <= share < 1:
                raise SettingsError(f"ranks.{name} is {share}; give a share of the run from 0 to below 1")
        if round(self.warmup + self.freeze, STEP_DIGITS) >= 1:
            raise SettingsError(
                f"ranks.warmup {self.warmup} and ranks.freeze {self.freeze} leave no step to adjust ranks in; "
                "together they must be below 1"
            )
        if not (isinstance(interval, Integral) and interval >= 1):
            raise SettingsError(f"ranks.interval is {interval}; give a whole number of optimizer steps, 1 or more")
        first = math.ceil(round(self.warmup * total, STEP_DIGITS))
        stop = math.ceil(round((1 - self.freeze) * total, STEP_DIGITS))
        return range(max(first, interval), stop, interval)

    def first_moves(self, layers: int) -> int:
        """Slots of this many layers that may move in the first adjustment."""
        return max(1, layers // 4) if self.moves is None else self.moves


def default_interval(total_steps: int) -> int:
    """Optimizer steps between adjustments of a run of so many: a twentieth of them, at least 10."""
    return max(10, total_steps // 20)


def moves_allowed(step: int, steps: range, *, first: int) -> int:
    """How many slots may be given up at `step`: `first` at the start, falling to 0 as a cubic.

    round(first · (1 - p³)) with p the share of the adjustment phase that is over; 0 outside the
    phase. The fall is as in ElaLoRA's b(t).

    >>> [moves_allowed(step, range(20, 100, 20), first=8) for step in (0, 20, 60, 80, 100)]
    [0, 8, 7, 5, 0]
    """
    if not steps.start <= step < steps.stop:
        return 0
    p = (step - steps.start) / (steps.stop - steps.start)
    return round(first * (1 - p**3))
