"""The drawn rows are found again in the file, whatever its order, its format or its doubles."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runs import Row, make_rows
from tables import cells_of
from tsqlora.auditing.draw.epochs import sample
from tsqlora.auditing.draw.select import select_rows
from tsqlora.auditing.scores import Scores, from_terms
from tsqlora.errors import DataError, SettingsError
from tsqlora.rows.chat import find_format
from tsqlora.rows.rows import Columns, row_hash, sample_hash
from tsqlora.rows.sources import open_table
from tsqlora.rows.write import write_rows

COLUMNS = {"columns": {"text": "text", "text_pair": None, "label": "label"}}
ROWS = make_rows(24, labels=("no", "yes"))


def scores_of(rows: list[Row], path: Path, *, hashes: bool = True, record: dict[str, Any] = COLUMNS) -> Scores:
    scores = from_terms(
        {"convergence": np.random.default_rng(0).normal(size=len(rows))},
        labels=np.array([row["label"] == "yes" for row in rows], dtype=np.int64),
        stratified=True,
        weights={"convergence": 1.0},
        temperature=1.0,
        record=record,
        hashes=[sample_hash(row["text"], "", str(row["label"])) for row in rows] if hashes else None,
    )
    scores.save(path)
    return scores


def selected(folder: Path, rows: list[Row], *, name: str = "data.jsonl", **options: Any) -> list[Row]:
    write_rows(folder / name, rows)
    out = folder / "out.jsonl"
    count = select_rows(folder / "s.parquet", out, data=folder / name, **({"fraction": 0.5} | options))
    chosen = list(cells_of(out))
    assert len(chosen) == count
    return chosen


def test_rows_are_those_of_the_sample_in_the_files_order(tmp_path: Path) -> None:
    chosen = sample(scores_of(ROWS, tmp_path / "s.parquet"), 0.5, seed=3)
    assert selected(tmp_path, ROWS, seed=3) == [ROWS[j] for j in chosen]


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.tsv", "data.parquet"])
def test_order_and_format_of_the_file_do_not_matter(name: str, tmp_path: Path) -> None:
    chosen = sample(scores_of(ROWS, tmp_path / "s.parquet"), 0.5)
    result = selected(tmp_path, [*make_rows(5, seed=9, labels=("no", "yes")), *ROWS[::-1]], name=name)
    assert result == [ROWS[j] for j in chosen[::-1]]


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_rows_of_the_inputs_format_keep_their_cells(extension: str, tmp_path: Path) -> None:
    scores = scores_of(ROWS, tmp_path / "s.parquet")
    data, out = tmp_path / f"data.{extension}", tmp_path / f"out.{extension}"
    write_rows(data, ROWS)
    if extension != "parquet":
        # Line ends that no writer of ours makes.
        data.write_bytes(data.read_bytes().replace(b"\n", b"\r\n"))
    assert select_rows(tmp_path / "s.parquet", out, fraction=0.5, data=data) == 12
    assert list(cells_of(out)) == [ROWS[j] for j in sample(scores, 0.5)]


def test_of_rows_that_look_alike_the_one_that_was_drawn_is_written(tmp_path: Path) -> None:
    doubled = [{**row, "n": j} for j, row in enumerate([*ROWS, *ROWS])]
    chosen = sample(scores_of(doubled, tmp_path / "s.parquet"), 0.5)
    assert [row["n"] for row in selected(tmp_path, doubled)] == chosen.tolist()


def test_an_id_leads_back_to_the_row_of_the_file(tmp_path: Path) -> None:
    ids = np.arange(1, 24, 2)
    scores = replace(scores_of([ROWS[j] for j in ids], tmp_path / "s.parquet"), ids=ids)
    scores.save(tmp_path / "s.parquet")
    numbered = [{**row, "n": j} for j, row in enumerate(ROWS)]
    chosen = sample(scores, 0.5)
    assert [row["n"] for row in selected(tmp_path, numbered)] == ids[chosen].tolist()
    select_rows(tmp_path / "s.parquet", tmp_path / "about.jsonl", fraction=0.5)
    assert [row["id"] for row in cells_of(tmp_path / "about.jsonl")] == ids[chosen].tolist()


def test_a_file_that_lacks_drawn_rows_is_refused(tmp_path: Path) -> None:
    scores_of(ROWS, tmp_path / "s.parquet")
    relabelled = [{**row, "label": "maybe"} for row in ROWS]
    with pytest.raises(DataError, match=r"lacks 12 of the 12 drawn rows.*text, label"):
        selected(tmp_path, relabelled)
    assert not (tmp_path / "out.jsonl").exists()


def test_without_hashes_rows_are_found_by_their_place(tmp_path: Path) -> None:
    chosen = sample(scores_of(ROWS, tmp_path / "s.parquet", hashes=False), 0.5)
    assert selected(tmp_path, ROWS) == [ROWS[j] for j in chosen]
    with pytest.raises(DataError, match="23 rows"):
        selected(tmp_path, ROWS[1:])


def test_without_the_file_what_is_known_of_the_rows_is_written(tmp_path: Path) -> None:
    scores = scores_of(ROWS, tmp_path / "s.parquet")
    select_rows(tmp_path / "s.parquet", tmp_path / "out.parquet", fraction=0.5)
    rows = cells_of(tmp_path / "out.parquet")
    assert [row["id"] for row in rows] == sample(scores, 0.5).tolist()
    assert scores.hashes is not None
    assert all(row["hash"] == scores.hashes[row["id"]] for row in rows)
    assert all(row["probability"] == pytest.approx(scores.probability[row["id"]]) for row in rows)


def test_the_scored_file_is_not_replaced(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    write_rows(data, ROWS)
    scores_of(ROWS, tmp_path / "s.parquet", record={**COLUMNS, "data": str(data)})
    with pytest.raises(SettingsError, match=r"would replace .*data\.jsonl"):
        select_rows(tmp_path / "s.parquet", data, fraction=0.5)
    assert len(open_table(data)) == 24


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
@pytest.mark.parametrize("kind", ["alpaca", "messages"])
def test_rows_of_generation_are_found_too(kind: str, name: str, tmp_path: Path) -> None:
    """With a prompt of two columns, or with a list of messages."""
    if kind == "alpaca":
        rows = [{"instruction": f"i{j}", "input": "x" * (j % 2), "output": f"o{j}"} for j in range(24)]
    else:
        turns = [[{"role": "user", "content": f"i{j}"}, {"role": "assistant", "content": "o"}] for j in range(24)]
        rows = [{"messages": some} for some in turns]
    columns = find_format(list(rows[0]), source="data").columns
    scores = from_terms(
        {"loss": np.arange(24.0)},
        labels=np.zeros(24, dtype=np.int64),
        stratified=False,
        weights={"loss": 1.0},
        temperature=1.0,
        record={"columns": asdict(columns)},
        hashes=[row_hash(row, columns) for row in rows],
    )
    scores.save(tmp_path / "s.parquet")
    chosen = sample(scores, 0.5)
    assert selected(tmp_path, rows, name=name) == [rows[j] for j in chosen]
    assert selected(tmp_path, rows[::-1], name=name) == [rows[j] for j in chosen[::-1]]


def test_a_draw_from_parts_is_the_draw_from_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"text": f"row {j}", "label": j % 2} for j in range(60)]
    drop = rng.random(60) < 0.2

    def scores(own: slice, data: Path) -> Scores:
        labels = np.array([row["label"] for row in rows[own]])
        names = [row_hash(row, Columns("text", None, "label")) for row in rows[own]]
        about = {"data": str(data), "columns": {"text": "text", "text_pair": None, "label": "label"}}
        how = {"labels": labels, "stratified": True, "weights": {"loss": -1.0}, "temperature": 1.0, "even": True}
        made = from_terms({"loss": np.zeros(len(labels))}, **how, record=about, hashes=names)
        return made.drop(drop[own], "confident negative")

    for name, own in (("0", slice(0, 25)), ("1", slice(25, 60)), ("whole", slice(0, 60))):
        data = tmp_path / "data" / f"{name}.jsonl"
        data.parent.mkdir(exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[own]))
        place = tmp_path / ("parts" if name != "whole" else ".") / f"{name}.parquet"
        place.parent.mkdir(exist_ok=True)
        scores(own, data).save(place)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    select_rows(tmp_path / "whole.parquet", whole, fraction=0.5, seed=3, data=tmp_path / "data" / "whole.jsonl")
    for pattern in ("parts", "parts/*.parquet"):
        assert select_rows(tmp_path / pattern, parts, fraction=0.5, seed=3, data=tmp_path / "data") == 30
        assert parts.read_text() == whole.read_text()
    assert select_rows(tmp_path / "parts", parts, fraction=0.5, seed=3) == 30
    assert {json.loads(line)["part"] for line in parts.read_text().splitlines()} == {"0.parquet", "1.parquet"}
    with pytest.raises(DataError, match="no part"):
        select_rows(tmp_path / "data", parts, fraction=0.5)


def test_parts_that_an_engine_wrote_are_drawn_from_and_their_rows_written_as_they_stand(tmp_path: Path) -> None:
    rows = [{"text": f"row {j}", "reason": "confident negative" if j % 5 == 0 else "kept"} for j in range(40)]
    for name, own in (("a", rows[:15]), ("b", rows[15:])):
        pq.write_table(pa.Table.from_pylist(own), tmp_path / f"{name}.parquet")
    assert select_rows(tmp_path, tmp_path / "some.jsonl", fraction=0.5) == 20
    drawn = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in drawn}) == 20
    assert {row["reason"] for row in drawn} == {"kept"}
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet"):
        select_rows(tmp_path, tmp_path / "some.jsonl", fraction=0.5)
