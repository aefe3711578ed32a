"""Progress in a terminal: bars, one a phase, and how training goes."""

import math
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tsqlora.progress import Pulse

_STEPS = "training"
"""The phase that counts steps; others count rows."""


class Display:
    """Progress bars, one a phase, and below them how training goes; a line now and then where there is no terminal.

    Args:
        every: seconds between two lines of one phase, without a terminal.
    """

    def __init__(self, console: Console, *, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.every, self.clock = console, every, clock
        self.bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,
        )
        self.pulse = Text()
        self.live = Live(Group(self.bars, self.pulse), console=console, refresh_per_second=8)
        self.phases: dict[str, TaskID] = {}
        self.told: dict[str, float] = {}
        self.begun: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "Display":
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        for task in self.phases.values():
            self.bars.remove_task(task)
        self.phases, self.told, self.begun = {}, {}, {}
        self.pulse.plain = ""
        self.console.print(text)

    def progress(self, phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
        """The Progress that the library reports to."""
        unit = "steps" if phase == _STEPS else "rows"
        if phase not in self.phases:
            self.phases[phase] = self.bars.add_task(phase, total=total, rate="")
        task = self.bars.tasks[self.bars.task_ids.index(self.phases[phase])]
        rate = f"{task.speed:.1f} {unit}/s" if task.speed else ""
        self.bars.update(task.id, completed=done, total=total, rate=rate)
        self.pulse.plain = "" if pulse is None else " · ".join(_pulse(pulse))
        if not self.console.is_interactive:
            self._tell(phase, done, total, unit, pulse)

    def _tell(self, phase: str, done: int, total: int, unit: str, pulse: Pulse | None) -> None:
        """A line when a phase begins, and one whenever `every` seconds have gone by."""
        now, before = self.clock(), self.told.get(phase)
        if before is not None and now - before < self.every:
            return
        self.told[phase] = now
        begun, first = self.begun.setdefault(phase, (now, done))
        if before is None:
            self.console.print(f"{phase}: {total:,} {unit}", soft_wrap=True, highlight=False, markup=False)
            return
        left = [f"{duration((total - done) * (now - begun) / (done - first))} left"] if done > first else []
        parts = [f"{done:,}/{total:,} {unit}", *left, *([] if pulse is None else _pulse(pulse))]
        self.console.print(f"{phase}: {', '.join(parts)}", soft_wrap=True, highlight=False, markup=False)


def _pulse(pulse: Pulse) -> list[str]:
    """How training goes, in words."""
    rows, tokens = pulse.rows_a_second, pulse.tokens_a_second
    return [
        *([] if pulse.loss is None else [f"loss {pulse.loss:.4g}"]),
        f"lr {pulse.learning_rate:.3g}",
        *([] if rows is None else [f"{_rounded(rows)} samples/s"]),
        *([] if tokens is None else [f"{_rounded(tokens)} tokens/s"]),
        f"{pulse.moved:,} rank{'' if pulse.moved == 1 else 's'} moved",
        f"{pulse.memory / 2**20:,.0f} MiB",
    ]


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """
    >>> duration(40), duration(4000)
    ('40 s', '1 h 7 min')
    """
    minutes = math.ceil(seconds / 60)
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
