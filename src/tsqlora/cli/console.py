"""Output of the command line, results on stdout and the rest on stderr, and options that several commands share.

Texts of rows and files are escaped, so that they cannot control the terminal.
"""

import json
import os
import traceback
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsqlora.errors import printable
from tsqlora.libs.quieten import quieten

if TYPE_CHECKING:  # rich takes a tenth of a second to import, and `tsqlora --help` needs none of it
    from rich.console import Console

    from tsqlora.cli.progress_bars import Display

_warned: set[str] = set()
"""Warnings that this process has printed."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, all else to stderr.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K.K=VALUE", help="Override a setting; repeatable.")]
Source = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or a run directory.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@cache
def terminal(*, stderr: bool = False) -> "Console":
    """Stdout or stderr; of several processes under torchrun or accelerate, only the first one prints."""
    from rich.console import Console

    # Square brackets in names and texts are not markup.
    return Console(stderr=stderr, markup=False, quiet=os.environ.get("RANK", "0") != "0")


def progress() -> "Display":
    """Bars on stderr, for a `with` block."""
    from tsqlora.cli.progress_bars import Display

    return Display(terminal(stderr=True))


def show(result: Mapping[str, Any], as_json: bool, how: str) -> None:
    """Print a command's result: as one JSON object, or by the function of cli/display.py that `how` names.

    Notes that were printed as warnings are left out.
    """
    if as_json:  # NaN and infinity are no JSON
        text = json.dumps(json.loads(json.dumps(result), parse_constant=lambda _: None))
        terminal().out(text, highlight=False)
        return
    from tsqlora.cli import display

    if "notes" in result:
        result = {**result, "notes": [note for note in result["notes"] if note not in _warned]}
    getattr(display, how)(terminal(), harmless(result))


def harmless(value: Any) -> Any:
    """The value with all control characters in its texts escaped."""
    if isinstance(value, str):
        return "\n".join(printable(line, longest=10**9) for line in value.split("\n"))
    if isinstance(value, Mapping):
        return {harmless(key): harmless(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [harmless(inner) for inner in value]
    return value


def note(text: str, mark: str = "") -> None:
    """Print a remark to stderr, behind a mark in rich's markup."""
    from rich.text import Text

    terminal(stderr=True).print(Text.from_markup(mark).append(harmless(text)), soft_wrap=True, highlight=False)


def error(problem: str, *, debug: bool = False) -> None:
    """Print an error from any process; with `debug` also its traceback."""
    if debug:
        traceback.print_exc()
    terminal(stderr=True).quiet = False
    note(problem, "[bold red]error:[/] ")


def quieten_libraries(*, debug: bool) -> None:
    """Print our warnings as a line each, and libraries' only with `debug`."""
    if debug:
        return
    quieten()
    warnings.filterwarnings("always", module="tsqlora")
    warnings.showwarning = lambda message, *_: _warn(str(message))


def _warn(text: str) -> None:
    _warned.add(text)
    note(text, "[yellow]warning:[/] ")
