"""bench/gpu.py in miniature, on whatever this machine has."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
gpu: Any = importlib.import_module("gpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_case_runs_and_device_and_cpu_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    gpu.main()
    cases = json.loads(out.read_text())["cases"]
    assert not [name for name, case in cases.items() if "error" in case]
    assert not [line for line, done in cases["engines"].items() if isinstance(done, dict) and "error" in done]
    for part in ("encoder", "decoder"):
        assert cases["parity"][part].pop("same ranks")
        assert max(cases["parity"][part].values()) < 1e-3


def test_the_engines_are_launched_by_the_lines_of_the_docs() -> None:
    lines = gpu.launch_lines()
    assert len(lines) == 3
    assert "tsqlora look tsq.yaml --out LOOK" in lines
    assert [line for line in lines if "--use_fsdp --fsdp_version 2" in line and "--look LOOK" in line]
    assert [line for line in lines if line.startswith("accelerate launch --num_processes 8 -m tsqlora.cli train")]
