"""The errors that tsqlora raises, and the findings that it lists.

    TsqLoraError            exit 1   failed while running
    ├── SettingsError       exit 2   wrong usage or settings
    ├── DataError           exit 3   a file, a row or a label is wrong; names it
    ├── UnsupportedError    exit 2   a layer, model or option that cannot be exact; names it
    └── StoppedError        exit 128 + signal   a signal stopped the run; its progress is saved

Messages give the thing, the value, the cure, in one or two lines.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class TsqLoraError(Exception):
    """Base of every error that tsqlora raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingsError(TsqLoraError, ValueError):
    """A setting or an argument is wrong."""

    exit_code = 2


class DataError(TsqLoraError, ValueError):
    """A file, a row or a label is wrong."""

    exit_code = 3


class UnsupportedError(TsqLoraError, NotImplementedError):
    """A layer, model or option that tsqlora cannot handle exactly."""

    exit_code = 2


class StoppedError(TsqLoraError):
    """A signal stopped the run."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.exit_code = 128 + signal

    def __str__(self) -> str:
        return printable(str(self.args[0]))


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with some rows, or with an adapter.

    `severity` is error, warning or note of rows; fault of an adapter by itself, wrong or refused of it in a server.
    `where` has numbers of rows, or layers with their numbers, none for all. `cure` has a line for each trainer of rows.
    """

    name: str
    severity: str
    where: tuple[Any, ...] = ()
    cause: str = ""
    cure: Any = ""


_LONGEST = 1500
"""Most characters of a message, which may quote untrusted text."""


def printable(text: str, longest: int = _LONGEST) -> str:
    """Escape control characters, and shorten long text in its middle.

    >>> printable("red \\x1b[31m"), printable("abcdefgh", 5)
    ('red \\\\x1b[31m', 'ab … gh')
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= longest else f"{shown[: longest // 2]} … {shown[-(longest // 2) :]}"


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest choice, and all choices.

    >>> nearest("lern", ["learn", "rest"])
    "did you mean 'learn'? choices: learn, rest"
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"choices: {', '.join(choices)}"


def few(items: Sequence[Any], most: int, between: str = ", ") -> str:
    """The first of some items, for a message.

    >>> few([4, 9, 7], 2), few([4, 9], 2)
    ('4, 9, …', '4, 9')
    """
    return between.join(map(str, items[:most])) + f"{between}…" * (len(items) > most)


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, else its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def of_loaded_model(function: Callable[P, T]) -> Callable[P, T]:
    """Raise SettingsError with the required arguments where the first one is a path or a name, not a model."""
    name, parameters = function.__name__, inspect.signature(function).parameters.values()

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, str | os.PathLike):
            required = ", ".join(one.name for one in parameters if one.default is one.empty)
            raise SettingsError(
                f"{name} needs a loaded model, not {os.fspath(model)!r}; call {name}({required}), or a "
                "command that reads files: `tsqlora --help`"
            )
        return function(*args, **kwargs)

    return checked
