"""Settings of runs that take seconds, on what bench/made.py makes, and the command line."""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tsqlora.cli import commands, console

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from made import Row, make_rows, save_checkpoint, write_config, write_jsonl

__all__ = ["Row", "make_rows", "run_cli", "save_checkpoint", "set_up", "write_config", "write_jsonl"]


def set_up(folder: Path, *, rows: int = 80, labels: Sequence[Any] = (0, 1), **sections: Mapping[str, Any]) -> Path:
    """The folder, with a checkpoint (model), rows (train.jsonl) and settings (c.yaml), which `sections` change."""
    model = save_checkpoint(folder / "model")
    data = write_jsonl(folder / "train.jsonl", make_rows(rows, labels=labels))
    write_config(folder / "c.yaml", model, data, **sections)
    return folder


@cache
def _wide(*, stderr: bool = False) -> Console:
    return Console(width=200, stderr=stderr, markup=False, quiet=os.environ.get("RANK", "0") != "0")


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run `tsqlora ARGUMENTS` in this process: exit code, stdout and stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tsqlora", *map(str, arguments)])
        patch.setattr(console, "terminal", _wide)
        with pytest.raises(SystemExit) as stopped:
            commands.main()
    return (int(stopped.value.code or 0), *capsys.readouterr())
