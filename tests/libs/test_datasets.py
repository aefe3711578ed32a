"""The contract with datasets: a failure here says which of its interfaces has changed."""

from tsqlora.libs.datasets import file_kinds


def test_kinds_of_files_are_known_by_name() -> None:
    """`datasets.packaged_modules._PACKAGED_DATASETS_MODULES`."""
    assert {"csv", "json", "parquet", "text"} <= {*file_kinds()}
