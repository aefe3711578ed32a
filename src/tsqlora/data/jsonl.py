"""JSON rows: one object a line, or one array of objects."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsqlora.data.utf8 import read_utf8, utf8_lines
from tsqlora.errors import DataError


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number and object, one after the other; blank lines are whitespace between them.

    Raises DataError with file and line for what is not JSON or not an object.
    """
    for number, line, _, _ in json_lines(path):
        yield number, _parse_line(line, f"{path}:{number}")


def read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, or the elements of one array with their 1-based places in it.

    An array is read whole.
    """
    first = next((line for _, line, _, _ in json_lines(path)), "")
    yield from _parse_array(read_utf8(path), path) if first.lstrip().startswith("[") else read_jsonl(path)


def json_lines(path: Path) -> Iterator[tuple[int, str, int, int]]:
    """Each line that is not blank: its number, its text, and where it starts and ends in the file's bytes."""
    # Not str.splitlines: it also cuts at U+2028 and others that JSON allows inside a string.
    for number, (line, end) in enumerate(utf8_lines(path, newline="\n"), start=1):
        if line.strip():
            yield number, line, end - len(line.encode()), end


def _parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{place}: not JSON ({_reason(exc)}); write one object a line") from exc
    return _object(value, place)


def _parse_array(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        values = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as exc:
        line = exc.lineno if isinstance(exc, json.JSONDecodeError) else 1
        raise DataError(f"{path}:{line}: not a JSON array ({_reason(exc)}); correct it there") from exc
    return [(number, _object(value, f"{path}:{number}")) for number, value in enumerate(values, start=1)]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return row


def _reason(exc: ValueError | RecursionError) -> str:
    return f"{exc.msg}, column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else str(exc)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f'{place}: a {kind} where a row must be an object like {{"text": "...", "label": 1}}')
    return value
