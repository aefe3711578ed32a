"""Images and recordings, from folders and tables to metrics, predictions, report and audit, by the commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from made_media import MAKE
from runs import write_config
from tables import cells_of
from tsqlora.auditing.scores import Scores
from tsqlora.rows.rows import ENDINGS
from tsqlora.rows.sources import folder_rows
from tsqlora.rows.write import write_rows

Run = Callable[..., tuple[int, str, str]]
SETTINGS = ("training.epochs=6", "training.learning_rate=0.02", "ranks.policy=tsqlora", "ranks.mean=2")


@pytest.fixture(scope="module", params=["image", "audio"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders data/{train,test}/CLASS, a model, and tables of the files with relative paths, two of them bad."""
    folder = tmp_path_factory.mktemp(request.param)
    write, save = MAKE[request.param]
    save(folder / "model")
    for seed, (split, count) in enumerate({"train": 60, "test": 20}.items()):
        write(folder / "data" / split, count, seed=seed)
        rows = [row for _, row in folder_rows(folder / "data" / split, request.param)]
        table = [{"path": str(Path(r[request.param]).relative_to(folder)), "label": r["label"]} for r in rows]
        bad = [{"path": name, "label": table[0]["label"]} for name in ("none.png", "broken.png")]
        write_rows(folder / f"{split}.csv", table + (bad if split == "train" else []))
    (folder / "broken.png").write_bytes(b"RIFF")
    return folder


def test_a_folder_of_classes_trains_measures_predicts_and_reports(place: Path, tsqlora: Run) -> None:
    run, kind = place / "run", place.name.removesuffix("0")
    sets = [part for setting in (*SETTINGS, "training.bf16=false") for part in ("--set", setting)]
    code, _, err = tsqlora("train", "--model", place / "model", "--data", place / "data", *sets, "--out", run)
    assert code == 0, err
    record = json.loads((run / "run.json").read_text())
    assert record["task"] == f"{kind}-classification"
    assert record["labels"] == sorted(folder.name for folder in (place / "data" / "test").iterdir())
    assert record["quality"]["looks"][0]["head_start"]["replaced"]
    assert record["metrics"]["test"]["accuracy"] > 0.8

    # A table with another name for the paths, relative to it; predictions elsewhere still find the files.
    out = place / "elsewhere" / "p.csv"
    assert tsqlora("predict", run, "--data", place / "data" / "test", "--out", out)[0] == 0
    code, shown, _ = tsqlora("evaluate", run, "--data", out, "--json")
    assert (code, json.loads(shown)) == (0, pytest.approx(record["metrics"]["test"]))
    code, shown, _ = tsqlora("explain", run, "--row", 3)
    assert (code, f"data/train/{record['labels'][0]}" in shown) == (0, True)
    assert tsqlora("report", run)[0] == 0
    assert f"{kind}-classification" in (run / "adapter" / "README.md").read_text()


def test_a_table_of_paths_scores_and_selects_and_names_its_bad_files(place: Path, tsqlora: Run) -> None:
    write_config(place / "c.yaml", place / "model", place / "train.csv", training={"epochs": 1, "bf16": False})
    code, _, err = tsqlora("score", place / "c.yaml", "--set", "data.max_bad_rows=0", "--out", place / "no.parquet")
    assert (code, "none.png" in err, "broken.png" in err) == (3, True, True)
    scores, subset = place / "s.parquet", place / "out" / "subset.csv"
    assert tsqlora("score", place / "c.yaml", "--out", scores)[0] == 0
    assert len(Scores.load(scores)) == 54
    assert tsqlora("select", scores, "--fraction", 0.5, "--data", place / "train.csv", "--out", subset)[0] == 0
    chosen = cells_of(subset)
    assert len(chosen) == 27
    assert all(Path(row["path"]).is_absolute() and Path(row["path"]).is_file() for row in chosen)


def test_an_audit_lists_files_and_its_review_is_applied_unless_another_file_came(
    place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    out, kind = tmp_path / "audit", place.name.removesuffix("0")
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    assert tsqlora("audit", data, "--model", place / "model", "--out", out)[0] == 0
    table = list(cells_of(out / "suspects.csv"))
    assert len(table) == 60
    assert all(
        Path(row["text"]).suffix in ENDINGS[kind] and Path(row["text"]).parent.name == row["label"] for row in table
    )
    assert ("data:image/png;base64,iVBOR" in (out / "audit.html").read_text()) == (kind == "image")
    table[0]["reviewed_label"] = other = table[0]["suggested_label"]
    write_rows(tmp_path / "r.csv", table)
    assert tsqlora("audit", "--apply", tmp_path / "r.csv", "--out", out)[0] == 0
    rows = cells_of(out / "corrected.jsonl")
    assert [row["label"] for row in rows if row[kind] == table[0]["text"]] == [other]
    assert sum(row["label"] != Path(row[kind]).parent.name for row in rows) == 1
    another = Path(table[0]["text"])
    shutil.copy(another, another.with_name(f"0{another.name}"))
    code, _, err = tsqlora("audit", "--apply", tmp_path / "r.csv", "--out", out)
    assert (code, "has changed since its audit" in err) == (3, True)


def test_a_review_of_a_table_of_paths_is_applied(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    table, out = tmp_path / "test.csv", tmp_path / "audit"
    rows = cells_of(place / "test.csv")
    number = {label: j for j, label in enumerate(dict.fromkeys(row["label"] for row in rows))}
    write_rows(table, [{"path": str(place / row["path"]), "label": number[row["label"]]} for row in rows])
    code, _, err = tsqlora("audit", table, "--model", place / "model", "--out", out)
    assert code == 0, err
    suspects = list(cells_of(out / "suspects.csv"))
    suspects[0]["reviewed_label"] = other = suspects[0]["suggested_label"]
    write_rows(tmp_path / "r.csv", suspects)
    code, _, err = tsqlora("audit", "--apply", tmp_path / "r.csv", "--out", out)
    assert code == 0, err
    rows = cells_of(out / "corrected.jsonl")
    assert [row["label"] for row in rows if row["path"] == suspects[0]["text"]] == [other]
    assert {type(row["label"]) for row in [*rows, *cells_of(out / "trusted.jsonl")]} == {str}


def test_a_model_of_texts_is_named(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    from runs import save_checkpoint

    model = save_checkpoint(tmp_path / "text")
    code, _, err = tsqlora("train", "--model", model, "--data", place / "data", "--out", tmp_path / "run")
    assert (code, "model.path" in err) == (2, True)
    code, _, err = tsqlora("train", "--model", model, "--data", place / "test.csv", "--out", tmp_path / "run")
    assert (code, "data.text" in err) == (3, True)
    assert not (tmp_path / "run").exists()
