"""examples/slurm_array.sh as local processes: one is killed, and the same command again does the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import make_rows, set_up, write_jsonl
from tsqlora.auditing.draw.select import select_rows
from tsqlora.settings import load_config
from tsqlora.training.look import look_at

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm_array.sh"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    set_up(tmp_path)
    look_at(load_config(tmp_path / "c.yaml"), tmp_path / "LOOK")
    (tmp_path / "parts").mkdir()
    write_jsonl(tmp_path / "parts" / "0.jsonl", make_rows(30, seed=10))
    return tmp_path


def task(place: Path) -> subprocess.Popen[str]:
    names = {"SLURM_ARRAY_TASK_ID": "0", "TSQLORA": f"{sys.executable} -m tsqlora.cli", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), str(place / "LOOK"), str(place / "parts"), str(place / "scores")]
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=os.environ | names, **options)


def test_a_killed_task_is_done_by_the_same_command_again(place: Path) -> None:
    killed = task(place)
    time.sleep(1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (place / "scores" / "0.parquet").exists()
    done = task(place)
    done.communicate(timeout=120)
    assert done.returncode == 0
    assert "is there" in task(place).communicate(timeout=60)[0]
    assert select_rows(place / "scores", place / "subset.jsonl", fraction=0.5, data=place / "parts") == 15
