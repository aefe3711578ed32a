"""A signal ends a training after its step, with a checkpoint; a second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import tsqlora as tsq
from scoring import quality_by
from stock import make_trainer, moods, slotted_bert
from tsqlora.errors import StoppedError
from tsqlora.training.stop import SIGNALS, StopCallback

ROWS = moods()
OURS = pytest.mark.filterwarnings("ignore:SIG.*stopping ")


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Also where tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(which: int) -> None:
    """Sends a signal to this process, and waits until it has come: another thread may be the first to get it."""
    handler = signal.getsignal(which)
    os.kill(os.getpid(), which)
    while signal.getsignal(which) == handler:
        time.sleep(0.001)


class SendAt(TrainerCallback):
    """A signal to this process in the middle of a step."""

    def __init__(self, step: int, which: int = signal.SIGTERM, times: int = 1) -> None:
        self.step, self.which, self.times = step, which, times

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            send(self.which)
            if self.times == 2:
                os.kill(os.getpid(), self.which)
                time.sleep(9)  # which it ends


def train(folder: Path, *also: TrainerCallback) -> None:
    """Five epochs of four steps, each saved at its end; test_resume.py goes on from such checkpoints."""
    data = tsq.QualitySubset(ROWS, 0.5, seed=0)
    callbacks = [quality_by(data, reference=40), *also]
    make_trainer(slotted_bert(), data, folder, callbacks, save_strategy="epoch", num_train_epochs=5).train()


@OURS
@pytest.mark.parametrize(
    ("step", "which"), [(6, signal.SIGTERM), (8, signal.SIGINT), (20, signal.SIGTERM)], ids=["within", "epoch", "last"]
)
def test_it_stops_after_the_step_with_a_checkpoint(step: int, which: signal.Signals, tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with (
        pytest.raises(
            StoppedError, match=f"^stopped by {which.name} after step {step}, which has a checkpoint; go on$"
        ) as updates,
        StopCallback("go on") as stop,
    ):
        train(tmp_path, SendAt(step, which), stop)
    assert updates.value.exit_code == 128 + which
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert tsq.last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"


@OURS
def test_ctrl_c_a_second_time_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StopCallback("go on") as stop:
        train(tmp_path, SendAt(6, signal.SIGINT, times=2), stop)
    assert tsq.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


@pytest.mark.parametrize("phases", [(), ("step",), ("step", "validation")])
def test_the_first_time_says_what_a_second_would_do(phases: tuple[str, ...]) -> None:
    """A checkpoint is written behind a step alone: a look or a validation just ends."""
    what = "after this step, with a checkpoint" if phases[-1:] == ("step",) else "soon"
    with StopCallback("go on") as stop:
        for phase in phases:
            if phase == "step":
                stop.on_step_begin(TrainingArguments("out", use_cpu=True), TrainerState(), TrainerControl())
            else:
                stop.watch(None)(phase, 1, 9)
        with pytest.warns(UserWarning, match=f"SIGTERM: stopping {what}; a second signal stops it at once"):
            send(signal.SIGTERM)
    assert stop.asked == signal.SIGTERM


@OURS
def test_where_there_are_no_steps_it_stops_at_the_next_report() -> None:
    phase = "validation"
    updates: list[tuple[str, int, int]] = []
    with StopCallback("go on") as stop:
        watched = stop.watch(lambda phase, done, total, _pulse=None: updates.append((phase, done, total)))
        watched(phase, 1, 9)
        send(signal.SIGTERM)
        watched("training", 1, 9)
        with pytest.raises(StoppedError, match=f"^stopped by SIGTERM in {phase}; go on$"):
            watched(phase, 2, 9)
    assert updates == [(phase, 1, 9), ("training", 1, 9), (phase, 2, 9)]
    stop.watch(None)("training", 1, 9)


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopCallback("go on") as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert stop.asked is None


def test_a_thread_leaves_the_handlers_alone() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]

    def within() -> None:
        with StopCallback("go on"):
            assert [signal.getsignal(each) for each in SIGNALS] == before

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()


def test_a_worker_of_a_data_loader_only_takes_note() -> None:
    stop = StopCallback("go on")
    with stop:
        stop._process = os.getpid() + 1
        stop._come(signal.SIGTERM, None)
    assert stop.asked is None
