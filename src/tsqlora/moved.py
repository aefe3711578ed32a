"""Names of earlier versions, and what each is now: moved.toml, which docs/moved.md shows."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsqlora.errors import SettingsError

MOVED: Mapping[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def what_of(entry: Any) -> str:
    """What a name of the table is now."""
    return entry["now"] if isinstance(entry, Mapping) else entry


def refuse_commands(arguments: Sequence[str]) -> None:
    """Raise SettingsError for a command, or for an option of one, that was removed."""
    options = {argument.partition("=")[0] for argument in arguments[1:]}
    for old, now in MOVED["commands"].items():
        command, *removed = old.split()
        if command == arguments[0] and options.issuperset(removed):
            raise SettingsError(f"`tsqlora {old}` was removed: {now}")


def drop_settings(values: dict[str, Any], *, trained: bool) -> None:
    """Drop removed settings from `values`; raise SettingsError for one that is not at its default, unless `trained`."""
    for key, entry in MOVED["settings"].items():
        *sections, setting = key.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        default = entry.get("was") if isinstance(entry, Mapping) else None
        value = section.pop(setting, default) if isinstance(section, dict) else default
        if isinstance(value, dict) and all(one is None for one in value.values()):  # as version 0.1 wrote weights
            value = None
        if value != default and not trained:
            raise SettingsError(f"{key} was removed: {what_of(entry)}")
