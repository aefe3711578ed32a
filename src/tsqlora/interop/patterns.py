"""Regular expressions that came with an adapter: tried where they can be given up, before anybody uses them."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from functools import lru_cache

from tsqlora.errors import DataError

SECONDS = 1
"""Of the processor, in which all patterns must have been tried on all names."""
LONGEST = 2000
"""Characters of a pattern."""
MOST_PAIRS = 25_000_000
"""Patterns times names."""

_NAME = re.compile(r"\^?(\w|\\?\.|-)+\$?", re.ASCII)
_TRIAL = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""


@lru_cache(maxsize=1 << 16)
def compiled(key: str) -> re.Pattern[str]:
    """A key of rank_pattern or alpha_pattern as PEFT 0.21 matches it (peft.utils.other.get_pattern_key)."""
    return re.compile(rf"(.*\.)?({key})$")


def require_quick(keys: Sequence[str], names: Collection[str], source: str) -> None:
    """Raises DataError if keys are no patterns, or take longer than SECONDS on these names.

    Python's matching cannot be given up half-way, and may take longer than the universe is old:
    patterns that are more than names are tried in a process of its own.
    """
    for key in keys:
        if len(key) > LONGEST:
            raise DataError(f"{source} has a key of {len(key):,} characters ({key}); write names of modules")
        try:
            re.compile(key)
            compiled(key)
        except (re.error, OverflowError, RecursionError) as error:
            raise DataError(f"{source} has the key {key!r}, which is no pattern ({error})") from None
    if len(keys) * len(names) > MOST_PAIRS:
        raise DataError(f"{source} has {len(keys):,} keys for {len(names):,} layers, which takes too long to match")
    suspects = sorted(key for key in keys if not _NAME.fullmatch(key))
    if not suspects:
        return
    told = json.dumps([[compiled(key).pattern for key in suspects], list(names)])
    # -I -S: no code from anywhere but the standard library.
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _TRIAL]
    if subprocess.run(command, input=told, text=True, stderr=subprocess.DEVNULL).returncode:
        listed = ", ".join(map(repr, suspects))
        raise DataError(f"{source} has keys that take too long to match ({listed}); write names of modules")
