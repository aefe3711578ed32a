"""Explanations: the right samples, their texts, and likely wrong labels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import make_rows, write_jsonl
from tsqlora.auditing.reasons import explain, likely_wrong, p_wrong, suspicion
from tsqlora.auditing.scores import Scores, from_terms
from tsqlora.errors import DataError
from tsqlora.rows.rows import sample_hash

ROWS = make_rows(40, labels=("no", "yes"))
TRUE = np.array([row["label"] == "yes" for row in ROWS], dtype=np.int64)
WRONG = np.arange(40) % 10 == 3


def made(data: Path | None, **changes: Any) -> Scores:
    """Scores of a model that is right about every row, of which some have the other label."""
    labels = np.where(WRONG, 1 - TRUE, TRUE)
    sure = np.random.default_rng(0).uniform(0.6, 0.9, size=40)
    sure[WRONG] = np.linspace(0.8, 0.95, WRONG.sum())
    own = np.where(WRONG, 1 - sure, sure)
    values: dict[str, Any] = {
        "terms": {"loss": -np.log(own), "convergence": own - 0.5},
        "labels": labels,
        "stratified": True,
        "weights": {"convergence": 1.0},
        "temperature": 1.0,
        "record": {
            "data": str(data),
            "columns": {"text": "text", "text_pair": None, "label": "label"},
            "classes": ["no", "yes"],
        },
        "hashes": [sample_hash(row["text"], "", ("no", "yes")[y]) for row, y in zip(ROWS, labels, strict=True)],
        "predictions": {"predicted": TRUE, "predicted_probability": sure, "label_probability": own},
    }
    return from_terms(**values | changes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    labels = np.where(WRONG, 1 - TRUE, TRUE)
    rows = [{**row, "label": ("no", "yes")[y]} for row, y in zip(ROWS, labels, strict=True)]
    return write_jsonl(tmp_path / "train.jsonl", rows)


def test_the_lists_hold_the_best_the_worst_and_the_suspicious(data: Path) -> None:
    scores = made(data)
    result = explain(scores, 4, data=None)
    assert [sample["id"] for sample in result["highest"]] == np.argsort(-scores.quality, kind="stable")[:4].tolist()
    assert result["lowest"][0]["quality"] == scores.quality.min()
    assert {sample["id"] for sample in result["suspicious"]} == set(np.flatnonzero(WRONG))
    json.dumps(result, allow_nan=False)
    tied = replace(scores, quality=np.full(40, -3.0))
    assert [one["id"] for one in explain(tied, 4)["lowest"]] == [one["id"] for one in result["suspicious"]]


def test_the_probability_of_a_wrong_label_is_the_judges() -> None:
    assert p_wrong(made(None)) is None  # not estimated
    judged = {"record": {"noise": {"evident": False}}}
    probability = p_wrong(made(None, **judged))
    assert probability is not None
    assert not probability.any()
    scores = made(None, **judged)
    wrong = np.linspace(0, 1, len(scores))
    scores = replace(scores, predictions={**scores.predictions, "wrong_probability": wrong})
    np.testing.assert_array_equal(p_wrong(scores), wrong)


def test_likely_wrong_labels_come_with_the_label_that_the_model_would_give(data: Path) -> None:
    scores = made(data)
    np.testing.assert_array_equal(likely_wrong(scores), WRONG)
    result = explain(scores, 2)
    assert result["likely_wrong_rows"] == 4
    assert len(result["likely_wrong"]) == 2
    for sample in result["likely_wrong"]:
        row = ROWS[sample["id"]]
        assert (sample["text"], sample["predicted"]) == (row["text"], row["label"])
        assert sample["label"] != row["label"]
        assert sample["predicted_probability"] >= 0.8
        assert sample["terms"].keys() == {"loss", "convergence"}


def test_likely_wrong_labels_count_those_that_are_left_out(data: Path) -> None:
    assert explain(made(data), 1)["likely_wrong_left_out"] == 0
    result = explain(made(data).drop(np.arange(40) < 14, "confident negative"), 1)
    assert (result["likely_wrong_rows"], result["likely_wrong_left_out"], result["kind"]) == (4, 2, "class")


def test_an_unsure_other_prediction_is_no_wrong_label(data: Path) -> None:
    scores = made(data)
    unsure = np.where(WRONG, 0.51, scores.predictions["predicted_probability"])
    assert not likely_wrong(replace(scores, predictions={**scores.predictions, "predicted_probability": unsure})).any()


def test_a_class_that_is_hard_as_a_whole_is_not_suspected(data: Path) -> None:
    scores = made(data)
    harder = scores.terms["loss"] + 5.0 * scores.labels
    np.testing.assert_allclose(suspicion(replace(scores, terms={"loss": harder})), suspicion(scores))


def test_a_regression_has_numbers_and_no_wrong_labels(data: Path) -> None:
    targets = np.linspace(0, 1, 40)
    scores = made(data, stratified=False, labels=targets, predictions={"predicted": targets + 0.25})
    result = explain(replace(scores, record=replace(scores.record, classes=None)), 3)
    assert result["likely_wrong"] == []
    assert result["highest"][0]["predicted"] == pytest.approx(result["highest"][0]["label"] + 0.25)
    np.testing.assert_array_equal(suspicion(scores), scores.terms["loss"] - np.median(scores.terms["loss"]))


def test_a_pair_shows_both_texts(tmp_path: Path) -> None:
    rows = [{"a": row["text"], "b": "and so", "label": y} for row, y in zip(ROWS, TRUE.tolist(), strict=True)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    columns = {"text": "a", "text_pair": "b", "label": "label"}
    hashes = [sample_hash(row["a"], row["b"], str(row["label"])) for row in rows]
    result = explain(made(None, hashes=hashes, record={"columns": columns}), 1, data=path)
    assert result["highest"][0]["text"].endswith("\nand so")


def test_a_file_of_other_rows_or_none_is_refused(data: Path) -> None:
    other = write_jsonl(data.parent / "other.jsonl", make_rows(3, seed=9))
    with pytest.raises(DataError, match=r"other.jsonl .*lacks 2.*--data"):
        explain(made(data), 1, data=other)
    scores = made(data)
    with pytest.raises(DataError, match="--data"):
        explain(replace(scores, record=replace(scores.record, data=None)), 1)
    with pytest.raises(DataError, match="no predictions"):
        explain(replace(scores, predictions={}), 1)
