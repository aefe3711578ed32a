"""A file that a command reads is parsed once, however often it looks at the rows."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runs import make_rows, set_up
from tsqlora.rows.readers import READERS
from tsqlora.rows.sources import FIRST


@pytest.mark.filterwarnings("ignore:rows are drawn evenly")
def test_every_command_parses_a_file_once(
    tmp_path: Path, tsqlora: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few: Any = {"ranks": {"policy": "fixed"}, "training": {"max_steps": 2}}
    place, parsed = set_up(tmp_path, rows=FIRST + 20, **few), Counter[str]()
    test = tmp_path / "test.csv"
    test.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in make_rows(6, seed=1)))
    for suffix, read in READERS.items():

        def counted(path: Path, dialect: object, read: Callable = read) -> Iterator[object]:
            yield from read(path, dialect)
            parsed[path.name] += 1  # to its end: the first rows alone tell what an audit is of

        monkeypatch.setitem(READERS, suffix, counted)
    config, run, rows = place / "c.yaml", place / "run", place / "train.jsonl"
    for words, files in (
        (("train", config, "--out", run, "--set", f"data.test={test}"), ["train.jsonl", "test.csv"]),
        (("score", config, "--out", place / "s.parquet"), ["train.jsonl"]),
        (("score", run, "--out", place / "r.parquet"), ["train.jsonl", "test.csv"]),
        (
            ("select", place / "s.parquet", "--fraction", "0.5", "--data", rows, "--out", place / "o.csv"),
            ["train.jsonl"],
        ),
        (("predict", run, "--data", test, "--out", place / "p.csv"), ["test.csv"]),
        (("evaluate", run, "--data", test), ["test.csv"]),
        (("audit", rows, "--model", place / "model", "--out", place / "audit"), ["train.jsonl"]),
    ):
        parsed.clear()
        assert tsqlora(*words)[0] == 0
        assert parsed == dict.fromkeys(files, 1), words
