"""Rows that lack a text or a label are left out, up to a share; the others keep their places in the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import make_rows, write_jsonl
from tsqlora.data.splits import Splits, read_data
from tsqlora.errors import DataError

GOOD = make_rows(20)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(train: Path, most: float, answer: Any = "class", **options: Any) -> Splits:
    names = ("format", "prompt", "target", "messages", "text") if answer == "text" else ("text", "text_pair", "label")
    common: dict[str, Any] = {"validation": None, "test": None, "validation_fraction": 0.2, "seed": 0} | options
    return read_data(str(train), answer=answer, columns=dict.fromkeys(names), max_bad_rows=most, **common)


@pytest.mark.parametrize(
    ("answer", "good", "bad", "reason"),
    [
        ("class", GOOD, {"text": " ", "label": 1}, "no text in column 'text'"),
        ("class", GOOD, {"text": "good"}, "no label in column 'label'"),
        ("number", [{**row, "label": 0.5} for row in GOOD], {"text": "a", "label": float("nan")}, "no label in"),
        (
            "class",
            [{**row, "text_pair": "a"} for row in GOOD],
            {"text": "a", "label": 1},
            "no text in column 'text_pair'",
        ),
        ("text", [{"prompt": "a", "completion": "b"}] * 20, {"prompt": "a", "completion": ""}, "no target in column"),
        ("text", [{"prompt": "a", "completion": "b"}] * 20, {"prompt": None, "completion": "b"}, "no text in column"),
        ("text", [{"instruction": "a", "output": "b"}] * 20, {"instruction": "", "output": "b"}, "'instruction'"),
        ("text", [{"text": "a"}] * 20, {"text": ""}, "no text in column 'text'"),
        ("text", [{"messages": CHAT}] * 20, {"messages": []}, "no messages in column 'messages'"),
        ("text", [{"messages": CHAT}] * 20, {"messages": CHAT[:1]}, "no assistant's turn"),
        ("text", [{"messages": CHAT}] * 20, {"messages": [CHAT[0], {**CHAT[1], "content": ""}]}, "a message without"),
    ],
)
def test_a_row_that_lacks_something_is_left_out_up_to_a_share(
    answer: str, good: Any, bad: Any, reason: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*good[:5], bad, *good[5:]])
    with pytest.raises(DataError, match=r"train\.jsonl: 1 of 21 .*data\.max_bad_rows \(0\.04\) .*line 6") as caught:
        read(path, 0.04, answer)
    assert reason in str(caught.value)
    with pytest.warns(UserWarning, match=r"train\.jsonl: 1 of 21 .*line 6") as told:
        splits = read(path, 0.05, answer)
    assert splits.notes == (str(told[0].message),)
    places = np.concatenate(list(splits.places.values()))
    assert sorted(places.tolist()) == [j for j in range(21) if j != 5]
    rows = splits.rows("train")
    assert [rows.numbers[i] - 1 for i in range(len(rows))] == splits.places["train"].tolist()


def test_the_share_is_of_each_file_and_one_message_counts_every_kind(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", GOOD)
    other = write_jsonl(tmp_path / "other.jsonl", [{"label": 0}, *GOOD, *[{"text": "good"}] * 7])
    with pytest.raises(DataError, match=r"other\.jsonl: 8 of 28 .* 1 with no text .*\(line 1\), 7 with no label") as e:
        read(train, 0.2, validation=str(other))
    assert "(lines 22, 23, 24, 25, 26, …)" in str(e.value)


def test_more_rows_than_a_chunk_count_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"label": 1}, *make_rows(2500), {"label": 1}])
    with pytest.warns(UserWarning, match=r"2 of 2,502 rows .*lines 1, 2502"):
        splits = read(path, 0.05)
    assert sum(map(len, splits.places.values())) == 2500
    assert splits.places["train"].min() >= 1
