"""Where a result comes from: the commit and the machine that made it."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from tsqlora.compare.origin import commit

commit()  # now, when the code is imported, and not hours later


def machine() -> dict[str, Any]:
    """What is at hand, and how much of it this process uses."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
