"""Output of the command line, results on stdout and the rest on stderr, and options that several commands share.

Texts of rows and files are escaped, so that they cannot control the terminal.
"""

import json
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tsqlora.compat.quieten import quieten
from tsqlora.errors import printable

# Square brackets in names and texts are not markup.
stdout, stderr = Console(markup=False), Console(stderr=True, markup=False)
_warned: set[str] = set()
"""Warnings that this process has printed."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, all else to stderr.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K.K=VALUE", help="Override a setting; repeatable.")]
Source = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or a run directory.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def show(result: Mapping[str, Any], as_json: bool, table: Callable[[Console, Mapping[str, Any]], None]) -> None:
    """Print a command's result: as one JSON object, or as its table, without notes that were printed as warnings."""
    if as_json:  # NaN and infinity are no JSON
        stdout.out(json.dumps(json.loads(json.dumps(result), parse_constant=lambda _: None)), highlight=False)
        return
    if "notes" in result:
        result = {**result, "notes": [note for note in result["notes"] if note not in _warned]}
    table(stdout, harmless(result))


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
    stderr.print(Text.from_markup(mark).append(harmless(text)), soft_wrap=True, highlight=False)


def error(problem: str, *, debug: bool = False) -> None:
    """Print an error from any process; with `debug` also its traceback."""
    if debug:
        traceback.print_exc()
    stderr.quiet = False
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
