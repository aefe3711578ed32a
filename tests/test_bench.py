"""Every script of bench/ finds what it imports: a benchmark that no longer starts is found out here, not in a year."""

import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"

IMPORT = """
import importlib, sys
sys.argv = ["bench"]
for name in sys.stdin.read().split():
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "llama_cpp", "gguf", "cleanlab"):
            raise
        print(f"{name} needs {error.name}")
"""


def test_every_benchmark_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in BENCH.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        input=" ".join(names),
        env=os.environ
        | {"PYTHONPATH": f"{BENCH}:{BENCH.parent / 'src'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(names) > 10
