"""Lengths of rows: from columns, never from files."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Image

from tsqlora.rows.datasets import lengths_of
from tsqlora.rows.table import samples_of

IDS = [[1, 2, 3], [4], [5, 6]]


def unread(*_: Any) -> None:
    pytest.fail("a row is read")


class Files:
    """Rows that would be decoded."""

    def __len__(self) -> int:
        return 3

    __getitem__ = unread


def test_lengths_are_those_of_a_column_whatever_the_others_are() -> None:
    files = [{"path": f"missing-{j}.png", "bytes": None} for j in range(3)]
    table = Dataset.from_dict({"input_ids": IDS, "image": files}).cast_column("image", Image())
    assert lengths_of(table) == [3, 1, 2]
    assert lengths_of(table.select([2, 0])) == [2, 3]
    assert lengths_of(table.with_transform(unread)) == [3, 1, 2]
    assert lengths_of(table.add_column("length", [7, 8, 9])) == [7, 8, 9]
    assert lengths_of(table.remove_columns("input_ids")) == [0, 0, 0]
    assert lengths_of(Dataset.from_dict({"length": ["long", "short", None]})) == [0, 0, 0]


def test_lengths_of_rows_in_memory_and_of_others() -> None:
    rows = [{"input_ids": ids} for ids in IDS]
    assert lengths_of(rows) == [3, 1, 2]
    assert lengths_of([(1, 2), {"length": 5}, {"x": 1}]) == [0, 5, 0]
    assert lengths_of(samples_of(rows, ("a", "b", "c"), 0, np.arange(3))) == [3, 1, 2]
    assert lengths_of(Files()) == [0, 0, 0]
