"""Interfaces of datasets that are private or differ between versions."""

from collections.abc import Collection, Mapping
from typing import Any


def file_kinds() -> Collection[str]:
    """Names that `load_dataset` treats as file formats ("csv", "json" …), not as data sets on the hub."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # seconds to import, and only hub ids need it

    return _PACKAGED_DATASETS_MODULES.keys()


def list_names(features: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """The names by class number of each column with lists of classes; `Sequence`, `List` and `LargeList` hold them."""
    parts: dict[str, Any] = {column: getattr(kind, "feature", None) for column, kind in features.items()}
    return {
        column: dict(enumerate(part.names)) for column, part in parts.items() if type(part).__name__ == "ClassLabel"
    }
