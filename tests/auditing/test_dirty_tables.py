"""A table as a spreadsheet writes it trains without a setting; every row that is named is the right one of the file."""

import json
from pathlib import Path

import numpy as np
import pytest

from runs import make_rows, run_cli, save_checkpoint, write_config
from tables import cells_of
from tsqlora.auditing.scores import Scores
from tsqlora.rows.readers import SNIFF, sniff

EMPTY, UNLABELLED = (7, 40, 100), 63
"""Places of rows without a text, and of the one without a label."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, settings, and a table with semicolons, cp1252, and rows that lack something."""
    folder = tmp_path_factory.mktemp("dirty")
    rows = make_rows(120)
    lines = ["nr;text;label"]
    for j, row in enumerate(rows):
        text = "" if j in EMPTY else f"{row['text']}, für 3,50 € ({j})"
        lines.append(f"{j};{text};{'' if j == UNLABELLED else ('gut', 'übel')[row['label']]}")
    (folder / "rows.csv").write_bytes("\r\n".join(lines).encode("cp1252"))
    training = {"epochs": 1.0, "batch_size": 16, "save_strategy": "no"}
    write_config(folder / "c.yaml", save_checkpoint(folder / "model"), folder / "rows.csv", training=training)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_every_command_names_the_right_rows_of_a_dirty_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tsqlora(*arguments: object, code: int = 0) -> tuple[str, str]:
        result, out, err = run_cli(capsys, *arguments)
        assert result == code, err
        return out, err

    table, run = folder / "rows.csv", folder / "run"
    out, err = tsqlora("train", folder / "c.yaml", "--out", run, "--json")
    left_out = [note for note in json.loads(out)["notes"] if "left out" in note]
    for output in (*left_out, err):
        assert "4 of 120 rows" in output
        assert "(lines 9, 42, 102)" in output
    assert sum(json.loads(out)["plan"]["rows"].values()) == 116
    shown = json.loads(tsqlora("train", folder / "c.yaml", "--dry-run", "--json")[0])["files"]
    assert shown == {str(table): "';' between columns, cp1252"}

    rows = cells_of(table)
    tsqlora("score", run, "--out", folder / "s.parquet")
    scores = Scores.load(folder / "s.parquet")
    assert scores.ids is not None
    assert not {*EMPTY, UNLABELLED} & {*scores.ids.tolist()}
    for j in (int(scores.ids.max()), int(scores.ids[8])):
        text = json.loads(tsqlora("explain", folder / "s.parquet", "--row", j, "--json")[0])["text"]
        assert text == rows[j]["text"]
        assert f"({j})" in text
    tsqlora("explain", run, "--row", EMPTY[0], code=3)

    tsqlora("select", folder / "s.parquet", "--fraction", 0.3, "--data", table, "--out", folder / "some.csv")
    assert sniff(folder / "some.csv", SNIFF) == sniff(table, SNIFF)
    some = cells_of(folder / "some.csv")
    assert len(some) == np.ceil(0.3 * len(scores))
    assert all(rows[int(row["nr"])] == row for row in some)

    _, err = tsqlora("predict", run, "--data", table, "--out", folder / "p.jsonl")
    predicted = cells_of(folder / "p.jsonl")
    assert [row["nr"] for row in predicted] == [row["nr"] for row in rows]
    assert [j for j, row in enumerate(predicted) if row["prediction"] is None] == list(EMPTY)
    assert "3 of 120 predictions are empty" in err
    tsqlora("evaluate", run, "--data", table)
