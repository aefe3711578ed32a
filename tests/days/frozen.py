"""Fifty days as files: what a user relies on, against which the code is rebuilt."""

import itertools
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from days.day import Day, day
from days.laws import BY_MODEL, Seen
from days.live import live

FOLDER = Path(__file__).parent / "frozen"
COUNT = 50
MENDED = (2091, 3606, 3699, 4280, 4442, 4836, 4857)
"""Days that broke a law once; each is frozen."""
SECONDS = 4.0
"""Of the processor: a frozen day is quick."""


def relied_on(seen: Seen) -> dict[str, Any]:
    """Exit codes, the findings of rows with their severities, and the rows that are not trained, with the reason."""
    return {
        "codes": seen.codes,
        "findings": {name: one for name, one in seen.findings.items() if name not in BY_MODEL},
        "reasons": seen.reasons,
    }


def stored() -> dict[str, dict[str, Any]]:
    """The frozen days by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def lived(one: Day) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        return live(one, Path(folder))


def freeze(start: int = 0) -> None:
    """Replace the frozen days by the first quick ones on which every law holds, of as many sorts as there are."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    sorts, count = Counter[str](), 0
    for number in itertools.chain(MENDED, itertools.count(start)):
        if count == COUNT:
            break
        one = day(number)
        parts = (one.door, one.family if one.of_texts else "labels", one.kind, one.fault or one.mask or "clean")
        shares = zip(parts, (0.15, 0.12, 0.1, 0.7), strict=True)
        if number not in MENDED and any(sorts[part] > COUNT * share for part, share in shares):
            continue
        begin = time.process_time()
        seen = lived(one)
        if seen.broken or seen.unlucky or time.process_time() - begin > SECONDS:
            continue
        sorts.update(parts)
        count += 1
        text = json.dumps({"day": asdict(one), **relied_on(seen)}, ensure_ascii=False, separators=(",", ":"))
        (FOLDER / f"{one.number:05d}.json").write_text(f"{text}\n", encoding="utf-8")
