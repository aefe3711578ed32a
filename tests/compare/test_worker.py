"""A training in its own process: it may have processes itself, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from runs import write_config
from tsqlora.compare.cell import run_cell
from tsqlora.compare.methods import Entry
from tsqlora.compare.worker import in_own_process
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.run.config import Config, load_config

LOADS_WITHOUT_END = """
import signal
from functools import partial
from torch.utils.data import DataLoader
from tsqlora.compare.worker import in_own_process

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
in_own_process("loading", partial(sum, DataLoader(range(10**9), batch_size=None, num_workers=1, collate_fn=int)))
"""
PROCESSES = 4
"""The resource tracker, the server, its child, and the child's worker."""


@pytest.fixture
def config(place: Path) -> Config:
    training = {"epochs": 2, "batch_size": 8, "bf16": False, "dataloader_num_workers": 1}
    return load_config(write_config(place / "worker.yaml", place / "model", place / "train.jsonl", training=training))


def test_a_process_of_its_own_gives_the_same_result_and_hands_errors_on(config: Config, tmp_path: Path) -> None:
    phases: list[str] = []
    work = partial(run_cell, config, Entry("lora", "all"), tmp_path / "run", equal="steps")
    result = in_own_process("lora", work, lambda phase, *_: phases.append(phase))
    assert result.metrics == work().metrics
    assert {"training", "validation"} <= set(phases)
    wrong = config.model_copy(update={"quality": config.quality.model_copy(update={"fraction": 0.005})})
    with pytest.raises(SettingsError, match="fraction"):
        in_own_process("wrong", partial(run_cell, wrong, Entry("lora", "loss"), tmp_path / "wrong", equal="steps"))


def test_a_process_that_dies_is_an_error(config: Config, tmp_path: Path) -> None:
    def die(phase: str, done: int, total: int, *_: object) -> None:
        servers = psutil.Process().children()  # they and the resource tracker are ours
        for process in psutil.Process().children(recursive=True):
            if process not in servers:
                process.kill()

    work = partial(run_cell, config, Entry("lora", "all"), tmp_path / "run", equal="steps")
    with pytest.raises(TsqLoraError, match="its process ended with code"):
        in_own_process("lora", work, die)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_its_parent_and_so_do_its_workers(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", LOADS_WITHOUT_END], stderr=subprocess.DEVNULL) as running:
        parent, end = psutil.Process(running.pid), time.monotonic() + 120
        while len(family := [p for p in parent.children(recursive=True) if _is_of_python(p)]) < PROCESSES:
            assert running.poll() is None, "it ended by itself"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)
        running.send_signal(how)
        _, left = psutil.wait_procs([parent, *family], timeout=30)
        for process in left:
            process.kill()
    assert not left


def _is_of_python(process: psutil.Process) -> bool:
    """Whether `multiprocessing` made it: at the same time the server asks git for the commit."""
    try:
        return "multiprocessing" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_it_sees_the_device_that_it_is_given() -> None:
    assert in_own_process("seeing", partial(os.getenv, "CUDA_VISIBLE_DEVICES"), device="3") == "3"


def test_an_error_that_does_not_pass_between_processes_is_handed_on_as_text() -> None:
    work = partial(exec, "class OddError(Exception): pass\nraise OddError('this')")
    with pytest.raises(TsqLoraError, match="OddError: this"):
        in_own_process("failing", work)
