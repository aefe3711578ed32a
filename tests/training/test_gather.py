"""What is gathered of a run: bins that hold every row, the rows worth a look, and why something is missing."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_runs import make_run, scores_of
from runs import make_rows, write_jsonl
from tsqlora.auditing.reasons import suspicion
from tsqlora.errors import DataError, SettingsError
from tsqlora.training.report.figures import BINS, bins, histograms
from tsqlora.training.report.run_page import LISTS, LONGEST, OF_A_KIND, choose_samples, run_page

ROWS = make_rows(60, labels=("no", "yes"))


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=60, max_size=60), dropped=st.integers(0, 59))
def test_every_row_is_in_one_bin_whatever_the_values(values: list[float], dropped: int) -> None:
    scores = scores_of(Path("x"), ROWS, dropped=dropped)
    drawn = histograms(replace(scores, terms={"t": np.array(values)}))
    assert [drawing.id for drawing in drawn] == ["histogram-0", "histogram-1", "histogram-2"]
    for drawing in drawn:
        bars, *left_out = drawing.figure.data
        assert len(left_out) == (dropped > 0 and drawing is not drawn[-1]), "left-out rows have no probability"
        for trace in drawing.figure.data:
            assert (np.diff(trace.x) > 0).all()
            assert (len(trace.x), sum(trace.y)) == (BINS, pytest.approx(1))
        assert bars.name == f"kept: {60 - dropped}"
    assert f"{min(values) + 0.0:.4g}" in drawn[0].title


def test_far_outliers_do_not_squeeze_the_others_into_one_bin() -> None:
    assert bins(np.append(np.linspace(0, 1, 2000), 1e9))[-1] < 2


def test_the_samples_are_the_best_the_worst_and_the_suspicious(tmp_path: Path) -> None:
    many = make_rows(400, labels=("no", "yes"))
    scores = scores_of(write_jsonl(tmp_path / "train.jsonl", many), many)
    samples = choose_samples(scores)
    by_list = {name: {row["id"] for row in samples.rows if name in row["marks"]} for name in LISTS.values()}
    for name, values in (("highest Q", -scores.quality), ("lowest Q", scores.quality)):
        assert by_list[name] == set(np.argsort(values, kind="stable")[:OF_A_KIND])
    assert by_list["most suspicious"] == set(np.argsort(-suspicion(scores), kind="stable")[:OF_A_KIND])
    assert {row["id"]: row["text"] for row in samples.rows} == {
        row["id"]: many[row["id"]]["text"] for row in samples.rows
    }
    assert all(row["why"].endswith("near-duplicate of another row") for row in samples.rows if row["id"] < 3)
    assert (samples.reasons["duplicate"], samples.without_texts) == (3, None)
    few = scores_of(write_jsonl(tmp_path / "few.jsonl", ROWS), ROWS)
    assert not any({"highest Q", "lowest Q"} <= {*row["marks"]} for row in choose_samples(few).rows)
    assert choose_samples(replace(few, quality=np.zeros(60))).lists == ["most suspicious"]


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (None, "is not on this machine"),
        ("{broken\n", "cannot be read"),
        (ROWS[:-5], "has changed and lacks"),
        ([{"other": "column"}], "has changed and lacks"),
    ],
)
def test_texts_that_are_not_found_are_left_out_and_said(there: list | str | None, why: str, tmp_path: Path) -> None:
    path, rows = tmp_path / "train.jsonl", there if isinstance(there, list) else []
    if isinstance(there, str):
        path.write_text(there)
    elif there is not None:
        write_jsonl(path, there)
    samples = choose_samples(scores_of(path, ROWS))
    assert why in (samples.without_texts or "")
    gathered = {row["text"] for row in rows if "text" in row}
    texts = [ROWS[row["id"]]["text"] for row in samples.rows]
    assert [row["text"] for row in samples.rows] == [text if text in gathered else None for text in texts]
    if rows:
        assert f"lacks {sum(text not in gathered for text in texts)} of these rows" in (samples.without_texts or "")


def test_texts_that_are_given_are_shown_must_be_of_the_rows_and_lose_their_middle_if_long(tmp_path: Path) -> None:
    scores = replace(scores_of(tmp_path / "gone.jsonl", ROWS), hashes=None)
    texts = [f"text {j}" + " long" * 1000 * (j == 7) + " end" for j in range(len(ROWS))]
    samples = choose_samples(scores, texts)
    assert samples.without_texts is None
    for row in samples.rows:
        text = texts[row["id"]]
        assert (row["text"] == text) == (len(text) <= LONGEST)
        assert (row["text"][:6], row["text"][-4:], len(row["text"]) <= LONGEST) == (text[:6], " end", True)
    with pytest.raises(SettingsError, match="texts"):
        choose_samples(scores, texts[1:])


def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    page = run_page(make_run(tmp_path, events=0, history=[]), "")
    assert "Samples to look at" not in page
    for what in ("quality.enabled is false", "logged no losses", "ranks.policy is fixed"):
        assert what in page
    assert "no scores.parquet" in run_page(make_run(tmp_path / "3", quality={"enabled": True, "used": True}), "")


@pytest.mark.parametrize("file", ["run.json", "config.yaml", "scores.parquet"])
def test_a_file_that_cannot_be_read_is_named(file: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=ROWS)
    (run / file).write_text("- broken")
    with pytest.raises(DataError, match=re.escape(file)):
        run_page(run, "")
    if file != "scores.parquet":
        (run / file).unlink()
        with pytest.raises(DataError, match=re.escape(file)):
            run_page(run, "")


def test_a_damaged_adapter_does_not_keep_a_run_from_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "adapter").mkdir()
    assert "see the doctor" in run_page(run, "")
