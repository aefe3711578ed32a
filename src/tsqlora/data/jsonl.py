"""JSON rows: one object a line, or one array of objects."""

import json
from pathlib import Path
from typing import Any

from tsqlora.data.utf8 import read_utf8
from tsqlora.errors import DataError


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Each line's number and object; blank lines are whitespace between them.

    Raises DataError with file and line for what is not JSON or not an object.
    """
    return _parse_lines(read_utf8(path), path)


def read_json(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, or the elements of one array with their 1-based places in it."""
    text = read_utf8(path)
    return _parse_array(text, path) if text.lstrip().startswith("[") else _parse_lines(text, path)


def _parse_lines(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    # Not str.splitlines: it also cuts at U+2028 and others that JSON allows inside a string.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse_line(line, f"{path}:{number}")) for number, line in lines if line.strip()]


def _parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{place}: not JSON ({_reason(exc)}); write one object a line") from exc
    return _object(value, place)


def _parse_array(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as exc:
        line = exc.lineno if isinstance(exc, json.JSONDecodeError) else 1
        raise DataError(f"{path}:{line}: not a JSON array ({_reason(exc)}); correct it there") from exc
    return [(number, _object(value, f"{path}:{number}")) for number, value in enumerate(values, start=1)]


def _reason(exc: ValueError | RecursionError) -> str:
    return f"{exc.msg}, column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else str(exc)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f'{place}: a {kind} where a row must be an object like {{"text": "...", "label": 1}}')
    return value
