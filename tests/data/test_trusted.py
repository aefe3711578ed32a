"""Trusted rows are read as validation rows are, and no row of theirs is measured on or trained on before them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from byte_tokenizers import CHATML, byte_tokenizer
from runs import Row, make_rows, save_checkpoint, write_jsonl
from tsqlora.data.prepare import Prepared, Writing, prepare
from tsqlora.data.splits import read_data
from tsqlora.errors import DataError
from tsqlora.quality.subset import equals


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("model")))


def prepared(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, answer: Any = "class", **files: Sequence[Row]
) -> Prepared:
    """Of rows by split name; a quarter of the training rows is held out where no validation rows are given."""
    paths = {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in files.items()}
    paths = {name: paths.get(name) for name in ("train", "validation", "test", "trusted")}
    names = ("format", "prompt", "target", "messages", "text") if answer == "text" else ("text", "text_pair", "label")
    columns = dict.fromkeys(names)
    splits = read_data(**paths, answer=answer, columns=columns, validation_fraction=0.25, seed=0)  # type: ignore[arg-type]
    writing = Writing(seq2seq=False, max_target_length=None) if answer == "text" else None
    return prepare(splits, tokenizer, max_length=60, writing=writing)


def labelled(texts: Sequence[str], label: int | None = None) -> list[Row]:
    return [{"text": text, "label": j % 2 if label is None else label} for j, text in enumerate(texts)]


POOL = labelled([f"good {'the ' * j}" for j in range(1, 9)])


def test_trusted_rows_are_a_split_of_their_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trusted, test = make_rows(6, seed=1), make_rows(4, seed=2)
    data = prepared(tmp_path, tokenizer, train=make_rows(20), trusted=trusted, test=test)
    assert list(data.samples) == list(data.splits.sources) == ["train", "trusted", "validation", "test"]
    assert data.splits.rows("trusted").rows == tuple(trusted)
    assert data.samples["trusted"].labels.tolist() == [row["label"] for row in trusted]
    assert equals(data.samples["train"], data.samples["trusted"]) is None
    assert data.notes == ()


def test_they_are_part_of_the_datas_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pool, trusted = make_rows(20), make_rows(6, seed=1)
    some = [{}, {"trusted": trusted}, {"trusted": trusted[:-1]}, {"trusted": trusted[::-1]}, {"validation": trusted}]
    assert len({prepared(tmp_path, tokenizer, train=pool, **files).hash for files in some}) == len(some)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "fine", "label": "c"}, r"trusted\.jsonl:2: label 'c' is not among the training data's classes"),
        (
            {"text": "fine", "label": ""},
            r"trusted\.jsonl: 1 of 2 .*data\.max_bad_rows \(0\) .*no label in column 'label'",
        ),
    ],
)
def test_a_trusted_row_that_training_could_not_have_is_named(
    row: Row, told: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"text": "kind", "label": "a"}, row]
    with pytest.raises(DataError, match=told):
        prepared(tmp_path, tokenizer, train=make_rows(10, labels=("a", "b")), trusted=rows)


def test_a_trusted_row_that_is_measured_on_leaves_whatever_its_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = labelled(["kind", "kind day", "warm", "warm day"], label=1)
    data = prepared(
        tmp_path, tokenizer, train=POOL, trusted=rows, validation=labelled(["kind"]), test=labelled(["warm day", "a"])
    )
    assert data.splits.places["trusted"].tolist() == [1, 2]
    assert [row["text"] for row in data.splits.rows("trusted").rows] == ["kind day", "warm"]
    assert len(data.samples["trusted"]) == 2
    (note,) = data.notes
    assert note.startswith("2 of 4 trusted rows are left out")


def test_what_is_held_out_of_the_training_rows_is_measured_on_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepared(tmp_path, tokenizer, train=POOL, trusted=POOL[:6])
    held_out = {row["text"] for row in data.splits.rows("validation").rows}
    kept = [row["text"] for row in POOL[:6] if row["text"] not in held_out]
    assert 0 < len(kept) < 6
    assert [row["text"] for row in data.splits.rows("trusted").rows] == kept
    assert f"{6 - len(kept)} of 6 trusted rows are left out" in data.notes[0]


def test_a_training_row_with_a_trusted_rows_input_is_marked_whatever_its_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turned = [{**row, "label": 1 - row["label"]} for row in (POOL[1], POOL[6])]
    data = prepared(tmp_path, tokenizer, train=POOL, trusted=turned + labelled(["kind"]), validation=labelled(["a"]))
    same = equals(data.samples["train"], data.samples["trusted"])
    assert same is not None
    assert np.flatnonzero(same).tolist() == [1, 6]
    assert len(data.samples["trusted"]) == 3
    assert data.notes == ()


def test_a_pair_is_one_input(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = [{"text": "good", "text_pair": second, "label": j % 2} for j, second in enumerate(("day", "tree", "a"))]
    data = prepared(tmp_path, tokenizer, train=train, trusted=[train[1]], validation=[{**train[1], "text": "bad"}])
    same = equals(data.samples["train"], data.samples["trusted"])
    assert same is not None
    assert same.tolist() == [False, True, False]


@pytest.mark.parametrize("trusted", [[0, 3], [3, 0, 0]])
def test_where_none_is_left_is_an_error(trusted: list[int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    measured = [POOL[0], {**POOL[3], "label": 0}]
    rows = [POOL[j] for j in trusted]
    with pytest.raises(DataError, match=r"trusted\.jsonl.* data\.trusted"):
        prepared(tmp_path, tokenizer, train=POOL, trusted=rows, validation=measured)


def chat(*turns: str) -> Row:
    """Turns by turns from the user and the assistant; the system's begin with s."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": names[turn[0]], "content": turn} for turn in turns]}


FORMATS: dict[str, tuple[Row, Row, Row]] = {
    "prompt": tuple({"prompt": p, "completion": c} for p, c in (("ab", "c"), ("ab", "d"), ("cd", "c"))),  # type: ignore[dict-item]
    "document": tuple({"document": p, "summary": c} for p, c in (("ab", "c"), ("ab", "d"), ("cd", "c"))),  # type: ignore[dict-item]
    "alpaca": tuple({"instruction": "a", "input": p, "output": c} for p, c in (("b", "c"), ("b", "d"), ("", "c"))),  # type: ignore[dict-item]
    "chat": (chat("s", "u1", "a1", "u2", "a2"), chat("s", "u1", "a1", "u2", "a3", "u4"), chat("s", "u1", "a2")),
    "text": ({"text": "ab"}, {"text": "ab"}, {"text": "abc"}),
}
"""Of each format a row, one with its input, one with another."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_s_input_is_its_prompt(name: str, tmp_path: Path) -> None:
    row, alike, other = FORMATS[name]
    writes = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>")
    data = prepared(
        tmp_path, writes, answer="text", train=[other, alike, other], trusted=[row, row], validation=[other]
    )
    same = equals(data.samples["train"], data.samples["trusted"])
    assert same is not None
    assert same.tolist() == [False, True, False]
    data = prepared(tmp_path, writes, answer="text", train=[alike, other], trusted=[row, other], validation=[alike])
    assert data.splits.places["trusted"].tolist() == [1]
