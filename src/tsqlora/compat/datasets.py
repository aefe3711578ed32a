"""What tsqlora needs of datasets that is private or differs between versions."""

from collections.abc import Collection


def file_kinds() -> Collection[str]:
    """Names that `load_dataset` takes for a format of files ("csv", "json" …), not for a data set on the hub."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # seconds to import, and only hub ids need it

    return _PACKAGED_DATASETS_MODULES.keys()
