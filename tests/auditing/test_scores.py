import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsqlora.auditing.draw.epochs import sample
from tsqlora.auditing.scores import Scores, from_terms
from tsqlora.errors import DataError, SettingsError, TsqLoraError


def made(**changes: Any) -> Scores:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "terms": {"loss": rng.normal(size=30).astype(np.float32), "cosine": rng.normal(size=30)},
        "labels": np.arange(30) % 3,
        "stratified": True,
        "weights": {"loss": 1.0, "cosine": -2.0},
        "temperature": 1.5,
        "record": {"eta": 0.1, "learned": {"passed": True}},
        "hashes": [f"h{j}" for j in range(30)],
    }
    return from_terms(**values | changes)


def assert_equal(left: Scores, right: Scores) -> None:
    assert left.terms.keys() == right.terms.keys()
    for name in left.terms:
        np.testing.assert_array_equal(left.terms[name], right.terms[name])
        assert left.terms[name].dtype == right.terms[name].dtype
    for name in ("labels", "quality", "probability"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert (left.stratified, left.hashes, left.temperature) == (right.stratified, right.hashes, right.temperature)
    np.testing.assert_array_equal(left.row_ids, right.row_ids)
    assert left.record == right.record
    np.testing.assert_array_equal(left.kept, right.kept)
    assert left.predictions.keys() == right.predictions.keys()
    for name in left.predictions:
        np.testing.assert_array_equal(left.predictions[name], right.predictions[name])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hashes": None},
        {"stratified": False, "labels": np.linspace(0, 1, 30)},
        {"predictions": {"predicted": np.arange(30) % 2, "label_probability": np.linspace(0, 1, 30)}},
        {"predictions": {"logits": np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)}},
        {"ids": np.arange(1, 61, 2)},
    ],
    ids=str,
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, changes: dict[str, Any]) -> None:
    scores = made(**changes)
    scores.save(tmp_path / "scores.parquet")
    loaded = Scores.load(tmp_path / "scores.parquet")
    assert_equal(scores, loaded)
    np.testing.assert_array_equal(sample(scores, 0.4, seed=3), sample(loaded, 0.4, seed=3))
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_file_has_one_row_a_sample_with_its_columns(tmp_path: Path) -> None:
    made().save(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["id", "hash", "label", "loss", "cosine", "quality", "probability", "reason"]
    assert table["id"].to_pylist() == list(range(30))
    assert table["reason"].to_pylist() == ["kept"] * 30
    assert table["hash"].to_pylist()[:2] == ["h0", "h1"]


def test_numpys_numbers_in_a_record_are_saved_as_numbers(tmp_path: Path) -> None:
    record = {"count": np.int64(3), "share": np.float32(0.5), "rows": np.arange(2), "passed": np.bool_(True)}
    made(record=record).save(tmp_path / "s.parquet")
    loaded = Scores.load(tmp_path / "s.parquet").record.to_dict()
    assert [loaded[name] for name in record] == [3, 0.5, [0, 1], True]
    json.dumps(loaded, allow_nan=False)


@pytest.mark.parametrize("record", [{"eta": float("inf")}, {"model": object()}])
def test_a_record_that_is_no_json_is_not_saved(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        made(record=record).save(tmp_path / "s.parquet")
    assert list(tmp_path.iterdir()) == []


def wrong_file(path: Path, kind: str) -> Path:
    if kind == "text":
        path.write_text("id,quality\n1,2\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "table":
        pq.write_table(pa.table({"quality": [1.0], "probability": [1.0], "label": [0]}), path)
    elif kind == "cut":
        made().save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "column":
        made().save(path)
        pq.write_table(pq.read_table(path).drop_columns(["quality"]), path)
    elif kind == "reason":
        made().save(path)
        table = pq.read_table(path)
        column = table.schema.get_field_index("reason")
        pq.write_table(table.set_column(column, "reason", pa.array(["bored"] * 30)), path)
    elif kind != "absent":  # a damaged record
        made().save(path)
        pq.write_table(pq.read_table(path).replace_schema_metadata({b"tsqlora": kind.encode()}), path)
    return path


@pytest.mark.parametrize(
    "kind", ["absent", "text", "cut", "folder", "table", "column", "reason", "{", "[]", "{}", '{"stratified": true}']
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"s\.parquet: "):
        Scores.load(wrong_file(tmp_path / "s.parquet", kind))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_term_that_is_not_finite_is_refused_with_its_row(value: float) -> None:
    loss = np.ones(30)
    loss[[4, 9]] = value
    for ids, row in ((None, 4), (np.arange(100, 130), 104)):
        with pytest.raises(TsqLoraError, match=rf"loss of row {row} is {value} \(2 rows"):
            made(terms={"loss": loss, "cosine": np.ones(30)}, ids=ids)


def test_terms_without_a_weight_are_kept_and_do_not_count() -> None:
    scores = made(weights={"loss": 1.0, "cosine": 0.0})
    np.testing.assert_array_equal(scores.quality, made(weights={"loss": 1.0}).quality)
    assert set(scores.terms) == {"loss", "cosine"}


def test_without_weights_all_rows_are_equal() -> None:
    scores = made(weights={})
    np.testing.assert_allclose(scores.probability, 1 / 30)
    assert scores.record.effective_sample_size == pytest.approx(30)


def first(rows: int) -> np.ndarray:
    return np.arange(30) < rows


def test_of_an_even_draw_quality_decides_nothing() -> None:
    scores = made(even=True).drop(first(3), "duplicate")
    assert scores.even
    assert len(set(scores.quality)) > 1
    retained = scores.probability[scores.kept]
    assert np.allclose(retained, 1 / scores.kept.sum())
    often = [j for seed in range(200) for j in sample(scores, 0.5, seed)]
    counts = np.bincount(often, minlength=len(scores))
    assert counts[:3].sum() == 0
    assert counts[3:].min() > 0.7 * counts[3:].mean()


def test_a_dropped_row_keeps_its_quality_and_is_never_drawn(tmp_path: Path) -> None:
    scores = made()
    fewer = scores.drop(first(6), "duplicate").drop(first(9), "outlier")
    np.testing.assert_array_equal(fewer.quality, scores.quality)
    assert (fewer.probability[:9] == 0).all()
    assert fewer.probability.sum() == pytest.approx(1)
    np.testing.assert_allclose(fewer.probability[9:], scores.probability[9:] / scores.probability[9:].sum())
    fewer.save(tmp_path / "s.parquet")
    loaded = Scores.load(tmp_path / "s.parquet")
    reasons = pq.read_table(tmp_path / "s.parquet")["reason"].to_pylist()
    assert reasons == ["duplicate"] * 6 + ["outlier"] * 3 + ["kept"] * 21
    assert loaded.dropped == {"duplicate": 6, "outlier": 3}
    for seed in range(20):
        taken = sample(loaded, 0.5, seed=seed)
        assert len(taken) == 15
        assert taken.min() >= 9


def test_a_fraction_of_more_rows_than_were_kept_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"fraction to 0.466"):
        sample(made().drop(first(16), "outlier"), 0.5)
    assert len(sample(made().drop(first(16), "outlier"), 0.466)) == 14


def test_dropping_for_no_known_reason_or_all_rows_is_refused() -> None:
    with pytest.raises(SettingsError, match="'outliers'"):
        made().drop(first(1), "outliers")
    with pytest.raises(TsqLoraError, match="'outlier'"):
        made().drop(first(30), "outlier")
