"""Write PEFT's rank_pattern and alpha_pattern, and match those of a hostile file safely."""

import math
import re
import time
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import regex

from tsqlora.errors import DataError, SettingsError

PATTERNS = ("rank_pattern", "alpha_pattern")
SECONDS = 5
"""Time limit for matching all patterns with all names."""
LONGEST = 2000
"""Characters of a pattern."""
MOST_PAIRS = 25_000_000
"""Patterns times names."""

_NAME = re.compile(r"\^?(\w|\\?\.|-)+\$?", re.ASCII)
"""A module's name or the end of one as a key, which Python's re matches quickly."""


def lora_config(ranks: Mapping[str, int], scale: float | Mapping[str, float]) -> dict[str, Any]:
    """Arguments of LoraConfig with a rank r and a scale s = alpha / r for each layer.

    The patterns name every layer, or none if all are equal. Layers at rank 0 are left out.

    >>> lora_config({"a": 2, "b": 4, "c": 0}, 2.0)["alpha_pattern"]
    {'a': 4, 'b': 8}

    Raises SettingsError if all layers are at rank 0.
    """
    active = {name: rank for name, rank in ranks.items() if rank > 0}
    if not active:
        raise SettingsError(
            "every layer is at rank 0, so the adapter would be empty; raise ranks.mean or set ranks.min to 1; for an "
            "export raise --keep or --max-rank"
        )
    alphas = {
        name: alpha_for(scale[name] if isinstance(scale, Mapping) else scale, rank) for name, rank in active.items()
    }
    largest = max(active, key=lambda name: active[name])
    return {
        "r": active[largest],
        "lora_alpha": alphas[largest],
        "target_modules": sorted(active),
        "rank_pattern": _pattern(active),
        "alpha_pattern": _pattern(alphas),
    }


def alpha_for(scale: float, rank: int) -> float | int:
    """The lora_alpha for which alpha / rank is the scale to the last bit, if one exists; whole numbers as int.

    >>> alpha_for(2.0, 8), alpha_for(0.3, 3) / 3, alpha_for(2.0, 0)
    (16, 0.3, 0)
    """
    about = scale * rank
    near = (about, math.nextafter(about, math.inf), math.nextafter(about, -math.inf))
    alpha = next((alpha for alpha in near if rank and alpha / rank == scale), about)
    return int(alpha) if alpha.is_integer() else alpha


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by PEFT's keys, which it matches with the end of names; none if all are equal.

    A key is anchored at the start if another layer's name ends with it.

    >>> _pattern({"encoder.query": 4, "vision.encoder.query": 8})
    {'^encoder.query': 4, 'vision.encoder.query': 8}
    """
    if len(set(values.values())) == 1:
        return {}
    anchored = {name for name in values if any(other.endswith(f".{name}") for other in values)}
    return {f"^{name}" if name in anchored else name: value for name, value in values.items()}


def scale_of(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank and scale that PEFT gives a module: the first matching key of each pattern wins.

    >>> config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"query": 4}, "alpha_pattern": {}}
    >>> scale_of("encoder.0.query", config), scale_of("encoder.0.key", config)
    ((4, 4.0), (8, 2.0))
    """
    rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if rank < 1:
        return rank, 1.0
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    return next((value for key, value in (pattern or {}).items() if _compiled(key).match(name)), default)


@lru_cache(maxsize=1 << 16)
def _compiled(key: str) -> Any:
    """A key compiled as PEFT 0.21 does it (peft.utils.other.get_pattern_key)."""
    return (re if _NAME.fullmatch(key) else regex).compile(rf"(.*\.)?({key})$")


def require_quick(keys: Collection[str], names: Collection[str], source: str) -> None:
    """Raise DataError if keys are invalid patterns, or take longer than SECONDS on these names.

    A regular expression can take practically for ever, so the `regex` package matches it, with a timeout.
    """
    end, key = time.monotonic() + SECONDS, ""
    try:
        if len(keys) * len(names) > MOST_PAIRS:
            raise TimeoutError
        for key in keys:
            if len(key) > LONGEST:
                raise TimeoutError
            re.compile(rf"(.*\.)?({key})$")
            for name in () if _NAME.fullmatch(key) else names:
                _compiled(key).match(name, timeout=max(end - time.monotonic(), 1e-6))
    except TimeoutError:
        raise DataError(f"{source} ({key!r}) takes too long to match; use names of modules") from None
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise DataError(f"{source} has the invalid pattern {key!r} ({error})") from None
