"""Folders of images or recordings: one row for each file, with the name of its folder as label."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

ENDINGS: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".au"),
}
"""File endings of each kind of media."""
MEDIA_ENDINGS = frozenset(ending for endings in ENDINGS.values() for ending in endings)
_SHOWN = 3


def kind_of(folder: Path) -> str | None:
    """Whether the first file of media in a folder, its folders, or theirs is "image" or "audio"; None without any."""
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(folder.glob(pattern)):
            for kind, endings in ENDINGS.items():
                if path.suffix.lower() in endings and path.is_file():
                    return kind
    return None


def folder_rows(folder: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The files of this kind, each with its path below the folder, and its row: an absolute path and the class.

    The class is the name of the first folder on that path; a file that lies beside these folders has none. Warns of
    files of other kinds.
    """
    rows, others = list[tuple[str, dict[str, Any]]](), list[str]()
    for path in sorted(_files(folder)):
        below = path.relative_to(folder)
        if path.suffix.lower() in ENDINGS[kind]:
            label = below.parts[0] if len(below.parts) > 1 else None
            rows.append((str(below), {kind: os.path.abspath(path), "label": label}))
        else:
            others.append(str(below))
    if others:
        shown = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        warnings.warn(f"{folder}: {len(others)} files are not read as {kind}: {shown}", stacklevel=5)
    return rows


def folder_digest(folder: Path, kind: str) -> str:
    """SHA-256 of the paths and sizes of the files that `folder_rows` reads."""
    files = (path for path in sorted(_files(folder)) if path.suffix.lower() in ENDINGS[kind])
    listing = [(str(path.relative_to(folder)), path.stat().st_size if path.exists() else None) for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden; links lead to folders elsewhere, to each once."""
    root, followed = Path(os.path.realpath(folder)), set[Path]()

    def enters(path: Path) -> bool:
        if not path.is_symlink():
            return True
        target = Path(os.path.realpath(path))
        apart = not target.is_relative_to(root) and not root.is_relative_to(target) and target not in followed
        followed.add(target)
        return apart

    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and enters(Path(parent, name))]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def content_hash(path: str) -> str:
    """16 hex digits that identify a file's content; "" for a file that cannot be read."""
    try:
        about = os.stat(path)
        return _content_hash(path, about.st_mtime_ns, about.st_size)
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=1 << 16)  # a row is hashed for its split, for twins in other splits, and for its sample
def _content_hash(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
