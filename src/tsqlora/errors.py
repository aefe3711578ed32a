"""What can go wrong, as one small tree.

    TsqLoraError            exit 1   failed while running
    ├── SettingsError       exit 2   wrong usage or settings
    ├── DataError           exit 3   a file, a row or a label is wrong; names which
    ├── UnsupportedError    exit 2   a layer, model or option that cannot be exact; names it
    └── StoppedError        exit 128 and the signal's number   asked to stop: what was done is kept

Messages give the thing, the value, the cure, in one or two lines.
"""

import difflib
from collections.abc import Iterable


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
    """Something that tsqlora cannot do exactly, refused by name."""

    exit_code = 2


class StoppedError(TsqLoraError):
    """A signal asked to stop."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.exit_code = 128 + signal

    def __str__(self) -> str:
        return printable(str(self.args[0]))


_LONGEST = 1500
"""Characters of a message: what it quotes may be a stranger's."""


def printable(text: str, longest: int = _LONGEST) -> str:
    """Text that says nothing to the terminal itself: control characters as escapes, the middle left out if it is long.

    >>> printable("red \\x1b[31m"), printable("abcdefgh", 5)
    ('red \\\\x1b[31m', 'ab … gh')
    """
    shown = text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)
    return shown if len(shown) <= longest else f"{shown[: longest // 2]} … {shown[-(longest // 2) :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest choice, and all of them.

    >>> nearest("lern", ["learn", "rest"])
    "did you mean 'learn'? choices: learn, rest"
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}choices: {', '.join(known)}"
