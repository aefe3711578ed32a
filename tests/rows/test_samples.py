"""Samples on disk are the samples that were given, and nothing is left of them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsqlora.rows.table import Samples, store, stored_in

CLASSES = [{"input_ids": list(range(n)), "attention_mask": [1] * n, "labels": n} for n in (3, 1, 2)]
NUMBERS = [{**sample, "labels": sample["labels"] / 7} for sample in CLASSES]
TARGETS = [{"input_ids": [5] * n, "labels": [-100] * (4 - n)} for n in (3, 1, 2)]
PROMPTS = [{"input_ids": [4] * n} for n in (3, 1, 2)]


def parts(samples: list[dict[str, Any]]) -> list[Samples]:
    first = Samples(samples[:2], ("a", "b"), 1, np.array([4, 6]), (("f:6", 9),))
    none_fits = Samples([], (), 0, np.array([], dtype=int), (("f:9", 8),))
    return [first, none_fits, Samples(samples[2:], ("c",), 1, np.array([9]))]


@pytest.mark.parametrize("samples", [CLASSES, NUMBERS, TARGETS, PROMPTS])
def test_what_is_stored_comes_back_as_plain_lists_and_numbers(samples: list[dict[str, Any]], tmp_path: Path) -> None:
    with stored_in(tmp_path):
        stored = store(parts(samples))
    assert not list(tmp_path.iterdir())
    for split in (stored, pickle.loads(pickle.dumps(stored))):  # as another process gets it
        assert list(split) == samples
        assert split[1:] == samples[1:]
        assert split[-1] == samples[-1] == split[2]
        assert [{name: type(value) for name, value in sample.items()} for sample in split] == [
            {name: type(value) for name, value in sample.items()} for sample in samples
        ]
    assert stored.lengths == [3, 1, 2]
    assert (stored.hashes, stored.truncated, stored.left_out) == (("a", "b", "c"), 2, (("f:6", 9), ("f:9", 8)))
    np.testing.assert_array_equal(stored.ids, [4, 6, 9])


@pytest.mark.parametrize("samples", [CLASSES, NUMBERS])
def test_labels_that_are_numbers_are_one_column(samples: list[dict[str, Any]]) -> None:
    for split in (store(parts(samples)), Samples(samples, ("",) * 3, 0, np.arange(3))):
        assert split.labels.tolist() == [sample["labels"] for sample in samples]


def test_a_row_on_disk_is_read_by_any_integer() -> None:
    stored = store(parts(CLASSES))
    assert [stored[j] for j in np.array([2, 0])] == [CLASSES[2], CLASSES[0]]
    assert list(stored.take(np.array([1]))) == [CLASSES[1]]
