"""What is read in chunks and kept on disk is what reading everything gives: the slow twin is `prepare`."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from byte_tokenizers import byte_tokenizer
from runs import make_rows, save_checkpoint, write_jsonl
from tsqlora.data import rows as rows_module
from tsqlora.data.prepare import Prepared, Writing, prepare, read_data
from tsqlora.data.rows import READERS, read_rows
from tsqlora.data.stored import StoredSamples, store_samples
from tsqlora.data.survey import store, survey_data, survey_texts, texts_of, with_whole_targets
from tsqlora.data.write import write_rows
from tsqlora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("model")))


def options(**changes: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"text": None, "text_pair": None, "label": None, "classes": True, "seed": 0}
    return {"validation": None, "test": None, "validation_fraction": 0.25, **defaults} | changes


def both(train: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, **changes: Any) -> tuple[Prepared, Prepared]:
    splits = read_data(str(train), **options(**changes))
    survey = survey_data(str(train), **options(**changes))
    return prepare(splits, tokenizer, max_length=8), store(survey, tokenizer, folder, max_length=8)


def test_of_texts_what_is_to_be_written_is_a_text_too(tmp_path: Path) -> None:
    """Or rows of one prompt with different answers would be each other's duplicates."""
    rows = [{"prompt": "Write a haiku.", "completion": f"Haiku {n}."} for n in range(4)]
    asked = dict.fromkeys(("format", "prompt", "target", "messages", "text", "validation", "test"))
    survey = survey_texts(str(write_jsonl(tmp_path / "train.jsonl", rows)), **asked, validation_fraction=0.25, seed=0)
    assert len(set(texts_of(survey, "train"))) == 3


def test_the_limit_that_no_target_fits_into_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * 20} for _ in range(4)]
    asked = dict.fromkeys(("format", "prompt", "target", "messages", "text", "validation", "test"))
    survey = survey_texts(str(write_jsonl(tmp_path / "train.jsonl", rows)), **asked, validation_fraction=0.25, seed=0)
    for limit, told in ((5, "5 tokens; raise data.max_target_length"), (None, "8 tokens; raise data.max_length")):
        with pytest.raises(DataError, match=f"no target fits whole into {told}"):
            with_whole_targets(
                survey,
                byte_tokenizer(opens=False, closes=True),
                max_length=8,
                writing=Writing(seq2seq=True, max_target_length=limit),
            )


def assert_same(slow: Prepared, fast: Prepared) -> None:
    assert fast.splits.labels == slow.splits.labels
    assert fast.columns() == slow.columns()
    for name in ("train", "validation"):
        one, other = slow.samples[name], fast.samples[name]
        assert list(other.samples) == list(one.samples)
        assert [type(row["labels"]) for row in other.samples] == [type(row["labels"]) for row in one.samples]
        assert (other.hashes, other.truncated, list(other.lengths)) == (one.hashes, one.truncated, list(one.lengths))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("labels", [(0, 1), ("no", "yes")])
@pytest.mark.parametrize("size", [1, 7, 1024])
def test_chunks_give_the_same_samples(
    size: int,
    labels: tuple[Any, Any],
    suffix: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_module.Source.chunks, "__defaults__", (size,))
    write_rows(tmp_path / f"train{suffix}", make_rows(30, labels=labels))
    slow, fast = both(tmp_path / f"train{suffix}", tokenizer, tmp_path)
    assert_same(slow, fast)
    assert fast.hash == slow.hash


def test_targets_of_a_regression_are_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{**row, "label": j / 7} for j, row in enumerate(make_rows(30))]
    assert_same(*both(write_jsonl(tmp_path / "train.jsonl", rows), tokenizer, tmp_path, classes=False))


def test_a_named_validation_file_leaves_the_training_rows_whole(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(6, seed=3))
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(30))
    slow, fast = both(train, tokenizer, tmp_path, validation=str(other))
    assert_same(slow, fast)
    ids = fast.samples["train"].ids
    assert ids is not None
    assert ids.tolist() == list(range(30))


def test_an_id_is_the_rows_place_in_the_file_whatever_its_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "train.csv"
    write_rows(path, [{**row, "text": f"{row['text']}\n{row['text']}"} for row in make_rows(30)])
    _, fast = both(path, tokenizer, tmp_path)
    file = read_rows(path).rows
    for name, split in fast.samples.items():
        assert split.ids is not None
        assert [file[j]["text"].split("\n")[0] for j in split.ids], name
        for place, sample in zip(split.ids, split.samples, strict=True):
            assert sample["input_ids"] == tokenizer(file[place]["text"], truncation=True, max_length=8)["input_ids"]
    assert not set(fast.samples["train"].ids.tolist()) & set(fast.samples["validation"].ids.tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "good", "mood": 1}] * 3,
        [*make_rows(8), {"text": "good", "label": None}],
        [*make_rows(8), {"text": "good", "label": "x"}],
        [*make_rows(2), {"label": 1, "words": "good"}],
        [{"text": "good", "label": 1}] * 3,
    ],
)
def test_what_is_wrong_is_said_alike(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError) as slow:
        prepare(read_data(str(train), **options()), tokenizer, max_length=8)
    with pytest.raises(DataError) as fast:
        store(survey_data(str(train), **options()), tokenizer, tmp_path, max_length=8)
    assert str(fast.value) == str(slow.value)


def peak_of_streaming(rows: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    train = write_jsonl(folder / "train.jsonl", make_rows(rows))
    tracemalloc.start()
    kept = store(survey_data(str(train), **options()), tokenizer, folder, max_length=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept.samples["train"]) == rows * 3 // 4
    return peak


def test_more_rows_take_no_more_memory_than_a_few_numbers_each(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    few, many = (peak_of_streaming(rows, tokenizer, tmp_path) for rows in (2000, 8000))
    # A row read whole, and its three lists of tokens, are more than 1,500.
    assert (many - few) / 6000 < 300


def test_every_reader_gives_one_row_after_the_other(tmp_path: Path) -> None:
    for suffix in READERS:
        path = tmp_path / f"t{suffix}"
        if suffix == ".json":
            write_jsonl(path, make_rows(2))
        else:
            write_rows(path, make_rows(2))
        records = READERS[suffix](path)
        assert next(iter(records))[1]["text"] == make_rows(1)[0]["text"]


def test_stored_samples_are_a_sequence_that_another_process_can_open(tmp_path: Path) -> None:
    samples = [{"input_ids": list(range(n)), "attention_mask": [1] * n, "labels": n} for n in (3, 1, 2)]
    stored = store_samples([samples[:2], samples[2:]], tmp_path / "tokens")
    for copy in (stored, pickle.loads(pickle.dumps(stored))):
        assert isinstance(copy, StoredSamples)
        assert list(copy) == samples
        assert copy[1:] == samples[1:]
        assert copy[-1] == samples[-1]
        assert copy.lengths == [3, 1, 2]
    unlabelled = store_samples([[{"input_ids": [4]}]], tmp_path / "more")
    assert unlabelled[0] == {"input_ids": [4]}
    np.testing.assert_array_equal(np.fromfile(tmp_path / "more", dtype=np.int32), [4])


def test_labels_that_are_lists_are_stored_in_their_own_length(tmp_path: Path) -> None:
    samples = [{"input_ids": [5] * n, "labels": [-100] * (4 - n)} for n in (3, 1, 2)]
    stored = store_samples([samples], tmp_path / "tokens")
    assert list(stored) == samples
    assert stored.lengths == [3, 1, 2]
