"""What the command line says: results on stdout, everything else on stderr.

Texts of rows and files are shown so that they cannot speak to the terminal itself.
"""

import json
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from tsqlora.compat.quieten import quieten
from tsqlora.errors import printable

stdout, stderr = Console(), Console(stderr=True)


def show(result: Mapping[str, Any], as_json: bool, table: Callable[[Console, Mapping[str, Any]], None]) -> None:
    """A command's result: as one JSON object, or as its table."""
    if as_json:
        stdout.out(json.dumps(result), highlight=False)
    else:
        table(stdout, harmless(result))


def harmless(value: Any) -> Any:
    """The same with texts that say nothing to the terminal itself: names and rows may be a stranger's."""
    if isinstance(value, str):
        return "\n".join(printable(line, longest=10**9) for line in value.split("\n"))
    if isinstance(value, Mapping):
        return {harmless(key): harmless(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [harmless(inner) for inner in value]
    return value


def note(text: str) -> None:
    """A line beside the result."""
    _say(text)


def error(problem: str, *, debug: bool = False) -> None:
    """What went wrong, from any process; with `debug` where."""
    if debug:
        traceback.print_exc()
    stderr.quiet = False
    _say(problem, "[bold red]error:[/] ")


def _say(text: str, mark: str = "") -> None:
    # Square brackets in it are no markup.
    stderr.print(f"{mark}{escape(harmless(text))}", soft_wrap=True, highlight=False)


def quieten_libraries(*, debug: bool) -> None:
    """Our warnings become a line each; what libraries say is for --debug."""
    if debug:
        return
    quieten()
    warnings.filterwarnings("always", module="tsqlora")
    warnings.showwarning = lambda message, *_: _say(str(message), "[yellow]warning:[/] ")
