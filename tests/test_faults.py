"""The short version of bench/faults.py: what befalls a training changes nothing of what comes of it."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "faults.py"


def test_a_training_survives_what_befalls_it(tmp_path: Path) -> None:
    """Killed in every phase, stopped, one of two processes killed; other tests cover the other groups."""
    groups, out = "kill:7,signal:1,process:1", tmp_path / "faults.json"
    command = [sys.executable, str(BENCH), "--groups", groups, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 9
    assert all(cell["survived"] for cell in cells.values())
