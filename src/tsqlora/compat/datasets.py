"""Interfaces of datasets that are private or differ between versions."""

from collections.abc import Collection


def file_kinds() -> Collection[str]:
    """Names that `load_dataset` treats as file formats ("csv", "json" …), not as data sets on the hub."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # seconds to import, and only hub ids need it

    return _PACKAGED_DATASETS_MODULES.keys()
