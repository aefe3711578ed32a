"""bench/gpu.py in miniature, on whatever this machine has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_case_runs_and_device_and_cpu_agree(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    subprocess.run([sys.executable, str(ROOT / "bench" / "gpu.py"), "--out", str(out)], check=True)
    cases = json.loads(out.read_text())["cases"]
    assert not [name for name, case in cases.items() if "error" in case]
    for part in ("encoder", "decoder"):
        assert cases["parity"][part].pop("same ranks")
        assert max(cases["parity"][part].values()) < 1e-3
    assert cases["pool"]["of the drawn rows"] > cases["pool"]["of the pool"]
