"""Why a row was drawn: the explanation agrees with the scores and with the rows that the run trained on."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runs import make_rows, set_up, write_jsonl
from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.auditing.reasons import WHY, explain_row, explain_source
from tsqlora.auditing.scores import REASONS, Scores
from tsqlora.errors import DataError
from tsqlora.settings import load_config
from tsqlora.training.command import train

Run = Callable[..., tuple[int, str, str]]
Draws = dict[int, np.ndarray]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Draws]:
    """A run with trusted rows, and the rows that each epoch of it had."""
    folder, drawn = tmp_path_factory.mktemp("explain"), dict[int, np.ndarray]()
    set_up(folder, labels=("no", "yes"))
    checked = [*make_rows(10, seed=7, labels=("no", "yes")), make_rows(80, labels=("no", "yes"))[3]]
    trusted = write_jsonl(folder / "trusted.jsonl", checked)
    config = load_config(folder / "c.yaml", [f"data.trusted={trusted}"])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        draw = QualitySubset._draw

        def watched(self: QualitySubset, epoch: int) -> None:
            draw(self, epoch)
            drawn[epoch] = self.indices

        patch.setattr(QualitySubset, "_draw", watched)
        train(config, folder / "run")
    return folder / "run", drawn


def test_every_row_counts_its_draws(trained: tuple[Path, Draws]) -> None:
    assert WHY.keys() == set(REASONS)
    run, drawn = trained
    scores = Scores.load(run / "scores.parquet")
    assert scores.ids is not None
    texts = [json.loads(line)["text"] for line in (run.parent / "train.jsonl").read_text().splitlines()]
    for place, row in enumerate(scores.ids.tolist()):
        actual = explain_source(run, row)
        assert actual["drawn"] == sum((rows == place).any() for rows in drawn.values())
        assert actual["epochs"] == len(drawn)
        assert actual["text"] == texts[row]
        assert actual["why"] == WHY[actual["reason"]]
        assert actual["out_of_sample"]
        json.dumps(actual, allow_nan=False)


def test_the_command_says_why(trained: tuple[Path, Draws], tsqlora: Run) -> None:
    run = trained[0]
    row = np.asarray(Scores.load(run / "scores.parquet").ids)[0]
    code, out, _ = tsqlora("explain", run, "--row", row)
    assert code == 0
    for word in (f"row {row}", "label", "prediction", "terms", "reason", "drawn", "by a fit without this row"):
        assert word in out
    result = json.loads(tsqlora("explain", run / "scores.parquet", "--row", row, "--json")[1])
    assert result["id"] == row
    assert "drawn" not in result
    code, _, err = tsqlora("explain", run, "--row", "1000")
    assert (code, "has 80 rows, numbered 0 to 79" in err) == (3, True)
    code, _, err = tsqlora("explain", run, "--row", row, "--data", "typo.csv")
    assert (code, "typo.csv is not on this machine" in err) == (3, True)


def test_a_row_without_a_score_says_why(trained: tuple[Path, Draws], tmp_path: Path) -> None:
    scores, rows = Scores.load(trained[0] / "scores.parquet"), make_rows(80, labels=("no", "yes"))
    row = int(np.setdiff1d(np.arange(80), scores.row_ids)[0])
    with pytest.raises(DataError, match=f"row {row} has no score: it was held out for validation"):
        explain_row(scores, row)
    rows[row]["text"] = " "
    with pytest.raises(DataError, match=rf"no text in column 'text' \(.*e\.jsonl:{row + 1}\), and was left out"):
        explain_row(scores, row, data=write_jsonl(tmp_path / "e.jsonl", rows))
    parted = replace(scores, record=replace(scores.record, data=str(tmp_path / "*.jsonl")))
    assert explain_row(parted, int(scores.row_ids[0]))["text"] == rows[int(scores.row_ids[0])]["text"]
    with pytest.raises(DataError, match=r"no text in column 'text' \(.*e\.jsonl:"):
        explain_row(parted, row)
    unnamed = replace(scores, record=replace(scores.record, data=None))
    with pytest.raises(DataError, match="--data FILE"):
        explain_row(unnamed, row)


def test_a_directory_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"`tsqlora score {tmp_path} --out {tmp_path}/scores.parquet`"):
        explain_source(tmp_path, 0)
