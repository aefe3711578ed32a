"""Bytes of a file -> text, always UTF-8, whole or line by line."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError

_BLOCK = 1 << 18


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark and with its line ends as they are.

    Raises DataError where the file cannot be read, or names the line that is not UTF-8.
    """
    return "".join(line for line, _ in utf8_lines(path, newline="\n"))


def utf8_lines(path: Path, *, newline: str) -> Iterator[tuple[str, int]]:
    """Each line with its line end, and how many bytes of the file end with it.

    `newline` is "\\n" where lines end at line feeds alone, "" where they end at any of \\n, \\r
    and \\r\\n.  A byte order mark is counted and left out.  Raises DataError as `read_utf8`.
    """
    try:
        _refuse_compressed(path)
        at = bom_length(path)
        for line in io.TextIOWrapper(io.BufferedReader(_Blocks(path, at), _BLOCK), encoding="utf-8", newline=newline):
            at += len(line.encode())
            yield line, at
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(_where_not_utf8(path)) from exc


def bom_length(path: Path) -> int:
    """Bytes of the byte order mark at the file's start, 0 if there is none."""
    with open(path, "rb") as file:
        return len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0


_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def _refuse_compressed(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{path} is compressed ({name}); unpack it and name the file inside")


class _Blocks(io.RawIOBase):
    """A file's bytes from a place on; it is open only while they are read, so nothing is left open half-way."""

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.at)
            count = file.readinto(buffer) or 0
        self.at += count
        return count


def _where_not_utf8(path: Path) -> str:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as exc:
                return f"{path}:{number}: byte 0x{line[exc.start]:02x} is not UTF-8; save the file as UTF-8"
    raise AssertionError(f"{path} changed while it was read")
