"""Progress in a terminal: a bar for each phase."""

import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """A progress bar for each phase; without a terminal, lines.

    Args:
        every: seconds between two lines of one phase, without a terminal.
    """

    def __init__(self, console: Console, *, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.every, self.clock = console, every, clock
        self.bars = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_interactive,
            get_time=clock,
            speed_estimate_period=300,
        )
        self.printed: dict[str, float] = {}
        """The time of the last line of each phase."""

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars, and remove those of earlier phases."""
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self.printed.clear()
        self.console.print(text, soft_wrap=True, highlight=False)

    def progress(self, phase: str, done: int, total: int, note: str = "", /) -> None:
        """The Progress that the library reports to."""
        task = next((task for task in self.bars.tasks if task.description == phase), None)
        number = self.bars.add_task(phase, total=total, note="") if task is None else task.id
        self.bars.update(number, completed=done, note=note)
        now, before = self.clock(), self.printed.get(phase)
        if self.console.is_interactive or (before is not None and now - before < self.every):
            return
        self.printed[phase] = now
        parts = [f"{total:,} {'steps' if phase == 'training' else 'rows'}"]
        if task is not None:
            left = [] if task.time_remaining is None else [f"{timedelta(seconds=int(task.time_remaining))} left"]
            parts = [f"{done:,}/{parts[0]}", *left, *([note] if note else [])]
        self.console.print(f"{phase}: {', '.join(parts)}", soft_wrap=True, highlight=False)
