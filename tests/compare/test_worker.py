"""A cell in a process of its own: it may have processes itself, and none outlives the one that asked."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.run import run_cell
from tsqlora.compare.worker import in_own_process
from tsqlora.run.config import load_config

LOADS_WITHOUT_END = """
import signal
from functools import partial
from torch.utils.data import DataLoader
from tsqlora.compare.worker import in_own_process

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
in_own_process("loading", partial(sum, DataLoader(range(10**9), batch_size=None, num_workers=1, collate_fn=int)))
"""
PROCESSES = 4
"""What tracks resources, the server, its child, and the child's worker."""


def test_rows_of_a_cell_may_come_from_workers(tmp_path: Path) -> None:
    training = {"epochs": 2, "batch_size": 8, "bf16": False, "dataloader_num_workers": 1}
    model, data = save_checkpoint(tmp_path / "model"), write_jsonl(tmp_path / "train.jsonl", make_rows(40))
    config = load_config(write_config(tmp_path / "c.yaml", model, data, training=training))
    cell = Cell(Entry("lora", "all"), 0, 0.02)
    found = in_own_process(cell.name, partial(run_cell, config, cell, equal="steps"))
    assert "failed" not in found
    assert found["steps"] == 6


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_the_process_that_asked_and_so_do_its_workers(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", LOADS_WITHOUT_END], stderr=subprocess.DEVNULL) as running:
        asked, end = psutil.Process(running.pid), time.monotonic() + 120
        while len(family := [p for p in asked.children(recursive=True) if _is_of_python(p)]) < PROCESSES:
            assert running.poll() is None, "it ended by itself"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)
        running.send_signal(how)
        _, left = psutil.wait_procs([asked, *family], timeout=30)
        for process in left:
            process.kill()
    assert not left


def _is_of_python(process: psutil.Process) -> bool:
    """Whether `multiprocessing` has made it: the server asks git for the commit meanwhile."""
    try:
        return "multiprocessing" in " ".join(process.cmdline())
    except psutil.Error:
        return False
