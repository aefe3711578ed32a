"""Bytes of a file -> text, always UTF-8, whole or line by line."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from tsqlora.errors import DataError


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
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            for line in file:
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


def _where_not_utf8(path: Path) -> str:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as exc:
                return f"{path}:{number}: byte 0x{line[exc.start]:02x} is not UTF-8; save the file as UTF-8"
    raise AssertionError(f"{path} changed while it was read")
