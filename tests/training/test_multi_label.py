"""Several labels per row, from the file to metrics, predictions, report, audit and corrected rows, by the commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tables import cells_of
from tsqlora.auditing.command import run_audit
from tsqlora.auditing.review import apply_review
from tsqlora.auditing.scores import Scores
from tsqlora.rows.write import write_rows

Run = Callable[..., tuple[int, str, str]]
TASK = {"type": "multi-label-classification"}


def labelled(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose mood is a label, and the house another."""
    rows = make_rows(n, seed=seed, labels=("sad", "glad"))
    return [{"text": r["text"], "labels": [r["label"]] + ["house"] * ("house" in r["text"])} for r in rows]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several labels")
    save_checkpoint(folder / "model")
    for name, count in (("train", 120), ("validation", 20), ("test", 30)):
        write_jsonl(folder / "data" / f"{name}.jsonl", labelled(count, seed=count))
    write_config(folder / "c.yaml", folder / "model", folder / "data", task=TASK, training={"epochs": 10})
    return folder


def test_a_run_trains_measures_predicts_and_reports(place: Path, tsqlora: Run) -> None:
    run, test = place / "run", place / "data" / "test.jsonl"
    assert tsqlora("train", place / "c.yaml", "--out", run)[0] == 0
    record = json.loads((run / "run.json").read_text())
    assert (record["task"], record["labels"]) == ("multi-label-classification", ["glad", "house", "sad"])
    assert record["quality"]["looks"][0]["head_start"]["replaced"]
    assert record["metrics"]["test"]["micro_f1"] > 0.7
    scores = Scores.load(run / "scores.parquet")
    assert scores.labels.shape == scores.predictions["predicted"].shape == (120, 3)
    assert "house" in tsqlora("explain", run, "--row", _row_with_house(place))[1]

    for name in ("p.jsonl", "p.csv"):
        assert tsqlora("predict", run, "--data", test, "--out", place / name)[0] == 0
        code, out, _ = tsqlora("evaluate", run, "--data", place / name, "--json")
        assert (code, json.loads(out)) == (0, pytest.approx(record["metrics"]["test"]))
    predicted = cells_of(place / "p.jsonl")
    right = sum(set(row["prediction"]) == set(row["labels"]) for row in predicted)
    assert right / len(predicted) == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert all(p > 0.5 for row in predicted for p in row["probability"])
    assert tsqlora("report", run)[0] == 0
    assert "glad, house" in (run / "report.html").read_text()

    # A class that no cell can hold is refused before the pass, not after it.
    other = shutil.copytree(run, place / "other")
    (other / "run.json").write_text((run / "run.json").read_text().replace('"house"', '"a|b"'))
    with patch("tsqlora.training.predict.predict_logits") as answers:
        code, _, err = tsqlora("predict", other, "--data", test, "--out", place / "q.csv")
    assert (code, "'a|b'" in err, answers.called) == (3, True, False)


def _row_with_house(place: Path) -> int:
    return next(j for j, row in enumerate(cells_of(place / "data" / "train.jsonl")) if "house" in row["labels"])


def test_an_audit_refuses_a_class_that_its_list_would_split(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    write_rows(tmp_path / "rows.jsonl", [{**row, "labels": ["a|b", *row["labels"]]} for row in labelled(20)])
    options = ("--model", place / "model", "--set", "task.type=multi-label-classification", "--out", tmp_path / "audit")
    with patch("tsqlora.auditing.command.load_model") as passed:
        code, _, err = tsqlora("audit", tmp_path / "rows.jsonl", *options)
    assert (code, "the class 'a|b' holds '|'" in err, passed.called) == (3, True, False)


def test_a_reviewed_audit_replaces_whole_sets_alone(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    rows, data = labelled(60), tmp_path / "rows.csv"
    write_rows(data, rows)
    options = ("--model", place / "model", "--set", "task.type=multi-label-classification", "--out", tmp_path / "audit")
    assert tsqlora("audit", data, *options)[0] == 0
    table = list(cells_of(tmp_path / "audit" / "suspects.csv"))
    assert sorted(int(line["row"]) for line in table) == list(range(60))
    for line in table:
        assert line["label"].split("|") == rows[int(line["row"])]["labels"]
        assert len(set(line["suggested_label"].split("|"))) == len(line["label"].split("|"))
    reviews = {3: "House|glad", 5: "|".join(rows[5]["labels"])}
    write_rows(tmp_path / "r.csv", [{**line, "reviewed_label": reviews.get(int(line["row"]), "")} for line in table])
    result = apply_review(tmp_path / "r.csv", tmp_path / "audit")
    assert (result["reviewed"], result["changed"]) == (2, 1)
    before, after = list(cells_of(data)), cells_of(result["corrected"])
    before[3] = {**before[3], "labels": "house|glad"}
    assert after == tuple(before)
    for wrong, named in (("glad|nothing", "'nothing'"), ("['glad' 'sad']", "['glad' 'sad']")):
        write_rows(tmp_path / "r.csv", [{**line, "reviewed_label": wrong} for line in table])
        code, _, err = tsqlora("audit", "--apply", tmp_path / "r.csv", "--out", tmp_path / "audit")
        assert (code, named in err) == (3, True)


def test_integers_stay_integers_in_a_corrected_copy(place: Path, tmp_path: Path) -> None:
    numbers = [[("sad", "glad", "house").index(label) for label in row["labels"]] for row in labelled(60)]
    rows = [{**r, "labels": y if len(y) > 1 else y[0]} for r, y in zip(labelled(60), numbers, strict=True)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = ["task.type=multi-label-classification"]
    run_audit(str(tmp_path / "rows.jsonl"), model=str(place / "model"), out=tmp_path / "audit", overrides=task)
    table = list(cells_of(tmp_path / "audit" / "suspects.csv"))
    one, other = [j for j, row in enumerate(rows) if isinstance(row["labels"], int)][:2]
    reviews = {one: "2", other: "1|2"}
    write_rows(tmp_path / "r.csv", [{**line, "reviewed_label": reviews.get(int(line["row"]), "")} for line in table])
    result = apply_review(tmp_path / "r.csv", tmp_path / "audit")
    after = cells_of(result["corrected"])
    assert (after[one]["labels"], after[other]["labels"]) == (2, [1, 2])
    assert [row["labels"] for row in cells_of(result["trusted"])] == [2, [1, 2]]


def test_a_label_that_training_lacks_and_label_smoothing_are_refused(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", labelled(20))
    write_jsonl(data / "test.jsonl", [{"text": "the day", "labels": ["glad", "angry"]}])
    code, _, err = tsqlora("train", place / "c.yaml", "--set", f"data.train={data}", "--out", tmp_path / "run")
    assert (code, "test.jsonl:1" in err, "'angry'" in err) == (3, True, True)
    smooth = ("--set", "training.label_smoothing_factor=0.1", "--out", tmp_path / "run")
    assert tsqlora("train", place / "c.yaml", *smooth)[0] == 2
    assert not (tmp_path / "run").exists()
