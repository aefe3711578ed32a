"""Samples on disk are the samples that were given, and nothing is left of them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsqlora.rows.table import Samples, samples_of, store, stored_in

CLASSES = [{"input_ids": list(range(n)), "attention_mask": [1] * n, "labels": n} for n in (3, 1, 2)]
NUMBERS = [{**sample, "labels": sample["labels"] / 7} for sample in CLASSES]
TARGETS = [{"input_ids": [5] * n, "labels": [-100] * (4 - n)} for n in (3, 1, 2)]
PROMPTS = [{"input_ids": [4] * n} for n in (3, 1, 2)]


def parts(samples: list[dict[str, Any]]) -> list[Samples]:
    first = samples_of(samples[:2], ("a", "b"), 1, np.array([4, 6]), (("f:6", 9),))
    none_fits = samples_of([], (), 0, np.array([], dtype=int), (("f:9", 8),))
    return [first, none_fits, samples_of(samples[2:], ("c",), 1, np.array([9]))]


@pytest.mark.parametrize("samples", [CLASSES, NUMBERS, TARGETS, PROMPTS])
def test_what_is_stored_comes_back_as_plain_lists_and_numbers(samples: list[dict[str, Any]], tmp_path: Path) -> None:
    with stored_in(tmp_path):
        stored = store(parts(samples))
    assert not list(tmp_path.iterdir())
    in_memory = samples_of(samples, stored.hashes, 2, stored.ids)
    for split in (in_memory, stored, pickle.loads(pickle.dumps(stored))):  # as another process gets it
        assert list(split) == samples
        assert split[1:] == samples[1:]
        assert split[-1] == samples[-1] == split[np.int64(2)]
        assert [{name: type(value) for name, value in sample.items()} for sample in split] == [
            {name: type(value) for name, value in sample.items()} for sample in samples
        ]
        assert split.lengths == [3, 1, 2]
    assert (stored.hashes, stored.truncated, stored.left_out) == (("a", "b", "c"), 2, (("f:6", 9), ("f:9", 8)))
    np.testing.assert_array_equal(stored.ids, [4, 6, 9])


@pytest.mark.parametrize("samples", [CLASSES, NUMBERS])
def test_labels_that_are_numbers_are_one_column(samples: list[dict[str, Any]]) -> None:
    assert store(parts(samples)).labels.tolist() == [sample["labels"] for sample in samples]


def test_no_samples_have_no_lengths_and_no_labels() -> None:
    for split in (samples_of([], (), 0, np.empty(0)), store([samples_of([], (), 0, np.empty(0))])):
        assert (len(split), list(split), split.lengths, split.labels.tolist()) == (0, [], [], [])
