import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsqlora.errors import DataError, SettingsError, TsqLoraError
from tsqlora.quality.epochs import sample
from tsqlora.quality.scores import Scores, from_terms


def made(**changes: Any) -> Scores:
    rng = np.random.default_rng(0)
    known: dict[str, Any] = {
        "terms": {"loss": rng.normal(size=30).astype(np.float32), "cosine": rng.normal(size=30)},
        "labels": np.arange(30) % 3,
        "stratified": True,
        "weights": {"loss": 1.0, "cosine": -2.0},
        "temperature": 1.5,
        "record": {"eta": 0.1, "learned": {"passed": True}},
        "hashes": [f"h{j}" for j in range(30)],
    }
    return from_terms(**known | changes)


def assert_equal(left: Scores, right: Scores) -> None:
    assert left.terms.keys() == right.terms.keys()
    for name in left.terms:
        np.testing.assert_array_equal(left.terms[name], right.terms[name])
        assert left.terms[name].dtype == right.terms[name].dtype
    for name in ("labels", "quality", "probability"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert (left.stratified, left.hashes, left.temperature) == (right.stratified, right.hashes, right.temperature)
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


def test_shards_are_plain_parquet_that_an_engine_takes_together(tmp_path: Path) -> None:
    from datasets import load_dataset

    for shard in range(2):
        made().save(tmp_path / f"scores-{shard}.parquet")
    files = str(tmp_path / "scores-*.parquet")
    both = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert both.num_rows == 2 * len(made())
    assert both.column_names == pq.read_schema(tmp_path / "scores-0.parquet").names
    assert np.allclose(both["quality"], np.tile(made().quality, 2))


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


def wrong_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.parquet"
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
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no such file; `tsqlora score` writes one"),
        ("text", "not a Parquet file"),
        ("cut", "not a Parquet file"),
        ("folder", "not a file of scores; `tsqlora score` writes one"),
        ("table", "not a file of scores; `tsqlora score` writes one"),
        ("column", "not a file of scores; `tsqlora score` writes one"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"{kind}.parquet: {message}"):
        Scores.load(wrong_file(tmp_path, kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"los": 1.0}}, "'los' has a weight and was not measured; did you mean 'loss'"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"hashes": ["h"]}, "there are 1 hashes for 30 rows"),
        ({"weights": {"loss": float("nan")}}, "the weight of 'loss' is nan"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        made(**changes)


def test_a_row_is_named_by_its_place_in_the_file_where_that_is_known() -> None:
    loss = np.ones(30)
    loss[4] = np.nan
    with pytest.raises(TsqLoraError, match="loss of row 104 is nan"):
        made(terms={"loss": loss, "cosine": np.ones(30)}, ids=np.arange(100, 130))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_term_that_is_not_finite_is_refused_with_its_row(value: float) -> None:
    loss = np.ones(30)
    loss[[4, 9]] = value
    with pytest.raises(TsqLoraError, match=rf"loss of row 4 is {value} \(2 rows in all are not finite\)"):
        made(terms={"loss": loss, "cosine": np.ones(30)})


def test_terms_without_a_weight_are_kept_and_do_not_count() -> None:
    scores = made(weights={"loss": 1.0, "cosine": 0.0})
    np.testing.assert_array_equal(scores.quality, made(weights={"loss": 1.0}).quality)
    assert set(scores.terms) == {"loss", "cosine"}


def test_without_weights_all_rows_are_equal() -> None:
    scores = made(weights={})
    np.testing.assert_allclose(scores.probability, 1 / 30)
    assert scores.record.effective_sample_size == pytest.approx(30)


def test_the_record_says_where_a_term_had_no_spread() -> None:
    loss = np.where(np.arange(30) % 3 == 1, 0.5, np.arange(30.0))
    cosine = np.where(np.arange(30) < 20, 0.0, np.arange(30.0))
    record = made(terms={"loss": loss, "cosine": cosine}).record
    assert record.without_spread == {"loss": [1]}
    assert record.standardised_by_quartiles == {"cosine": [0, 1, 2]}


def test_classes_are_standardised_each_by_itself() -> None:
    loss = np.random.default_rng(1).normal(size=30) + 100.0 * (np.arange(30) % 3)
    scores = made(terms={"loss": loss}, weights={"loss": 1.0})
    for label in range(3):
        assert np.median(scores.quality[scores.labels == label]) == pytest.approx(0, abs=1e-9)
    together = made(terms={"loss": loss}, weights={"loss": 1.0}, stratified=False)
    assert together.strata is None
    assert abs(np.median(together.quality[together.labels == 2])) > 0.5


def test_a_sample_is_ascending_stratified_and_the_same_for_the_same_seed() -> None:
    scores = made()
    taken = sample(scores, 0.5, seed=1)
    assert (np.diff(taken) > 0).all()
    assert np.bincount(scores.labels[taken]).tolist() == [5, 5, 5]
    np.testing.assert_array_equal(taken, sample(scores, 0.5, seed=1))
    assert sample(scores, 0.5, seed=2).tolist() != taken.tolist()


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_without_a_meaning_is_refused(fraction: float) -> None:
    with pytest.raises(SettingsError, match=f"fraction is {fraction}; it must be above 0 and at most 1"):
        sample(made(), fraction)


def test_better_rows_are_drawn_more_often() -> None:
    scores = made(temperature=0.5)
    often = np.bincount(np.concatenate([sample(scores, 0.3, seed=s) for s in range(200)]), minlength=30)
    assert np.corrcoef(often, scores.quality)[0, 1] > 0.7


def first(rows: int) -> np.ndarray:
    return np.arange(30) < rows


def test_of_an_even_draw_quality_decides_nothing() -> None:
    scores = made(even=True).drop(first(3), "duplicate")
    assert scores.even
    assert len(set(scores.quality)) > 1
    kept = scores.probability[scores.kept]
    assert np.allclose(kept, 1 / scores.kept.sum())
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
    assert {name: n for name, n in loaded.record.dropped.items() if n} == {"duplicate": 6, "outlier": 3}
    for seed in range(20):
        taken = sample(loaded, 0.5, seed=seed)
        assert len(taken) == 15
        assert taken.min() >= 9


def test_a_class_with_too_few_kept_rows_is_filled_up_by_the_others() -> None:
    scores = made().drop((np.arange(30) % 3 == 0) & (np.arange(30) > 0), "confident negative")
    taken = sample(scores, 0.5)
    assert np.bincount(scores.labels[taken]).tolist() == [1, 7, 7]


def test_a_fraction_of_more_rows_than_were_kept_is_refused() -> None:
    with pytest.raises(
        SettingsError,
        match=r"a draw of 15 rows is more than the 14 of 30 rows that were not dropped; lower fraction to 0.466",
    ):
        sample(made().drop(first(16), "outlier"), 0.5)
    assert len(sample(made().drop(first(16), "outlier"), 0.466)) == 14


def test_dropping_for_no_known_reason_or_all_rows_is_refused() -> None:
    with pytest.raises(SettingsError, match="unknown reason 'outliers'; did you mean 'outlier'"):
        made().drop(first(1), "outliers")
    with pytest.raises(TsqLoraError, match="all 30 rows are dropped, the last as 'outlier'"):
        made().drop(first(30), "outlier")


def test_a_file_with_an_unknown_reason_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet")
    reasons = table.schema.get_field_index("reason")
    pq.write_table(table.set_column(reasons, "reason", pa.array(["bored"] * 30)), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"s.parquet: the reason 'bored' is none of kept, duplicate"):
        Scores.load(tmp_path / "s.parquet")


def test_an_id_is_the_place_that_was_given(tmp_path: Path) -> None:
    made(ids=np.arange(30) * 2 + 1).save(tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet")["id"].to_pylist() == list(range(1, 61, 2))
    loaded = Scores.load(tmp_path / "s.parquet").ids
    assert loaded is not None
    assert loaded.tolist() == list(range(1, 61, 2))


@pytest.mark.parametrize("metadata", [b"{", b"[]", b"{}", b'{"stratified": true}'])
def test_a_file_whose_record_is_damaged_or_lacks_something_is_named(metadata: bytes, tmp_path: Path) -> None:
    made().save(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet").replace_schema_metadata({b"tsqlora": metadata})
    pq.write_table(table, tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"s\.parquet"):
        Scores.load(tmp_path / "s.parquet")
