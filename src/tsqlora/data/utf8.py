"""Bytes of a file -> text, always UTF-8."""

import codecs
from pathlib import Path

from tsqlora.errors import DataError


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark and with its line ends as they are.

    Raises DataError where the file cannot be read, or names the line that is not UTF-8.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        byte = data[exc.start]
        raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from exc
