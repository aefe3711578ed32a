"""Progress in a terminal: a bar for each phase, and the state of training."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tsqlora.progress import Pulse, duration

_STEPS = "training"
"""The phase that counts steps; others count rows."""


class Display:
    """A progress bar for each phase, and below them the state of training; without a terminal, lines.

    Args:
        every: seconds between two lines of one phase, without a terminal.
    """

    def __init__(self, console: Console, *, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.every, self.clock = console, every, clock
        self.bars = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=300,
        )
        self.pulse = Text()
        self.live = Live(Group(self.bars, self.pulse), console=console, refresh_per_second=8)
        self.phases: dict[str, TaskID] = {}
        self.last_line: dict[str, float] = {}
        self.start: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "Display":
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars, and remove those of earlier phases."""
        for task in self.phases.values():
            self.bars.remove_task(task)
        self.phases, self.last_line, self.start = {}, {}, {}
        self.pulse.plain = ""
        self.console.print(text, soft_wrap=True, highlight=False)

    def progress(self, phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
        """The Progress that the library reports to."""
        unit = "steps" if phase == _STEPS else "rows"
        if phase not in self.phases:
            self.phases[phase] = self.bars.add_task(phase, total=total, rate="")
        task = self.bars.tasks[self.bars.task_ids.index(self.phases[phase])]
        rate = f"{task.speed:.1f} {unit}/s" if task.speed else ""
        self.bars.update(task.id, completed=done, total=total, rate=rate)
        self.pulse.plain = "" if pulse is None else " · ".join(_state(pulse))
        if not self.console.is_interactive:
            self._print_line(phase, done, total, unit, pulse)

    def _print_line(self, phase: str, done: int, total: int, unit: str, pulse: Pulse | None) -> None:
        """A line at the start of a phase, and one every `every` seconds."""
        now, before = self.clock(), self.last_line.get(phase)
        if before is not None and now - before < self.every:
            return
        self.last_line[phase] = now
        begun, first = self.start.setdefault(phase, (now, done))
        if before is None:
            self.console.print(f"{phase}: {total:,} {unit}", soft_wrap=True, highlight=False)
            return
        left = [f"{duration((total - done) * (now - begun) / (done - first))} left"] if done > first else []
        parts = [f"{done:,}/{total:,} {unit}", *left, *([] if pulse is None else _state(pulse))]
        self.console.print(f"{phase}: {', '.join(parts)}", soft_wrap=True, highlight=False)


def _state(pulse: Pulse) -> list[str]:
    """The state of training, without what is not measured yet."""
    rates = {"samples/s": pulse.rows_a_second, "tokens/s": pulse.tokens_a_second}
    measured = {unit: rate for unit, rate in rates.items() if rate is not None}
    return [
        *([] if pulse.loss is None else [f"loss {pulse.loss:.4g}"]),
        f"lr {pulse.learning_rate:.3g}",
        *(f"{rate:,.0f} {unit}" if rate >= 10 else f"{rate:.2g} {unit}" for unit, rate in measured.items()),
        f"{pulse.moved:,} rank{'' if pulse.moved == 1 else 's'} moved",
        f"{pulse.memory / 2**20:,.0f} MiB",
    ]
