"""Interfaces of datasets that are private or differ between versions."""

import json
from collections.abc import Collection, Mapping
from typing import Any


def file_kinds() -> Collection[str]:
    """Names that `load_dataset` treats as file formats ("csv", "json" …), not as data sets on the hub."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # seconds to import, and only hub ids need it

    return _PACKAGED_DATASETS_MODULES.keys()


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names by class number of each column of classes, or of lists of them, as `Features.to_dict` writes both.

    Names that are the numbers themselves do not count.

    >>> class_names({"label": {"names": ["bad", "good"], "_type": "ClassLabel"}, "text": {"_type": "Value"}})
    {'label': ('bad', 'good')}
    """
    columns = dict[str, tuple[str, ...]]()
    for column, kind in features.items():
        part = kind[0] if isinstance(kind, list) and kind else kind  # lists before datasets 4
        while isinstance(part, Mapping) and "feature" in part:
            part = part["feature"]
        names = part.get("names") if isinstance(part, Mapping) and part.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and names != [str(number) for number in range(len(names))]:
            columns[column] = tuple(map(str, names))
    return columns


def class_names_of_parquet(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """As `class_names`, of the features that datasets writes into a Parquet file; none of other files."""
    try:
        return class_names(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
