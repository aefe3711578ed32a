"""SIGTERM and Ctrl-C: a training ends after the step that it is in, with a checkpoint."""

import os
import signal
import threading
import warnings
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.errors import StoppedError
from tsqlora.progress import Progress

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopCallback(TrainerCallback):
    """While it is open (`with`), a signal makes the current step the last one, and its checkpoint is saved.

    Then StoppedError is raised. In scoring and evaluation `watch` raises it at once. A second signal has its usual
    effect. It comes after the callback that completes checkpoints.

    Args:
        advice: how to continue, for the error.
    """

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self.asked: int | None = None
        """The signal, once one has arrived."""
        self._last: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopCallback":
        # Python sets handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            # What is ignored stays so: Ctrl-C of what was started in a shell's background, or by nohup.
            heard = [which for which in SIGNALS if signal.getsignal(which) != signal.SIG_IGN]
            self._before = {which: signal.signal(which, self._come) for which in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        self._before = {}

    def watch(self, progress: Progress | None) -> Progress:
        """A Progress that raises in phases without steps, once a signal has arrived."""

        def report(phase: str, done: int, total: int, note: str = "", /) -> None:
            if progress is not None:
                progress(phase, done, total, note)
            self._in_step &= phase == "training"
            if self.asked is not None and phase != "training":
                raise self._stopped(f"in {phase}")

        return report

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._in_step = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not every process may have received the signal by this step.
        if distributed.any_process(self.asked is not None, args.device):
            self.asked = self.asked or signal.SIGTERM
            control.should_save = True
            self._last = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.global_step == self._last:
            raise self._stopped(f"after step {self._last}, which has a checkpoint")

    def _come(self, which: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which its parent ends
            return
        self.__exit__()
        self.asked = which
        name = signal.Signals(which).name
        when = "after this step, with a checkpoint" if self._in_step else "soon"  # a look ends without one
        warnings.warn(f"{name}: stopping {when}; a second signal stops it at once", stacklevel=1)

    def _stopped(self, where: str) -> StoppedError:
        assert self.asked is not None
        return StoppedError(f"stopped by {signal.Signals(self.asked).name} {where}; {self.advice}", self.asked)
