"""A run read back says what it said when it was trained, of any file and in any format."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from models import collate, samples, tiny_bert
from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tables import cells_of
from tsqlora.auditing.reasons import explain_source
from tsqlora.errors import DataError, TsqLoraError
from tsqlora.model.named import device_of
from tsqlora.model.request import Compute
from tsqlora.record import RunRecord
from tsqlora.rows import sources
from tsqlora.rows.sources import open_table
from tsqlora.rows.write import write_rows
from tsqlora.settings import Config, load_config
from tsqlora.tasks import get_task
from tsqlora.training.command import train
from tsqlora.training.job import open_run
from tsqlora.training.predict import evaluate_run, predict_logits, predict_run, predictor_of
from tsqlora.training.score import score_rows

NAMES = ("no", "yes")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with its own test file, plain LoRA: what is read back does not depend on the method."""
    folder = tmp_path_factory.mktemp("inference")
    save_checkpoint(folder / "model")
    for name, rows in (("train", 60), ("validation", 10), ("test", 20)):
        write_jsonl(folder / "data" / f"{name}.jsonl", make_rows(rows, seed=rows, labels=NAMES))
    plain = {"quality": {"enabled": False, "fraction": 1.0}, "ranks": {"policy": "fixed", "mean": 2.0}}
    config = write_config(folder / "c.yaml", folder / "model", folder / "data", **plain, training={"epochs": 15})
    train(load_config(config), folder / "run")
    return folder / "run"


def data_of(run: Path) -> Path:
    return run.parent / "data" / "test.jsonl"


def test_metrics_of_the_runs_own_file_are_those_it_recorded(run: Path) -> None:
    recorded = RunRecord.load(run).metrics["test"]
    assert evaluate_run(run) == recorded
    confusions = RunRecord.load(run).confusions
    right, rows = (sum(n for a, b, n in confusions if a == b or every) for every in (False, True))
    assert right / rows == recorded["accuracy"]
    assert evaluate_run(run, data_of(run)) == pytest.approx(recorded)


def test_logits_do_not_depend_on_what_else_is_in_the_file(run: Path) -> None:
    trained = open_run(run)
    samples = trained.with_files({"test": open_table(data_of(run))}).data["test"].samples
    whole, *alone = (
        predictor_of(trained).logits(rows, phase="prediction") for rows in (samples, *([sample] for sample in samples))
    )
    np.testing.assert_allclose(whole, np.concatenate(alone), atol=1e-5)


@pytest.mark.parametrize("extension", ["jsonl", "tsv"])
def test_every_row_keeps_its_columns_and_its_place(extension: str, run: Path, tmp_path: Path) -> None:
    rows = [{"id": f"r{j}", "text": row["text"], "note": 'a, "b"\n'} for j, row in enumerate(make_rows(7, seed=3))]
    write_rows(tmp_path / f"in.{extension}", rows)
    out = tmp_path / "new" / f"out.{extension}"
    assert predict_run(run, tmp_path / f"in.{extension}", out) == 7
    written = cells_of(out)
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    assert all(row["prediction"] in NAMES and 0.5 <= float(row["probability"]) <= 1 for row in written)
    assert (max(len(str(row["probability"])) for row in written) <= 8) == (extension == "tsv")


def test_texts_that_are_cut_are_told(run: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "no"} for text in ("fine", "fine " * 60)]
    write_jsonl(tmp_path / "long.jsonl", rows)
    with pytest.warns(UserWarning, match=r"^1 of 2 texts of .*long\.jsonl were cut to 32 tokens$"):
        predict_run(run, tmp_path / "long.jsonl", tmp_path / "out.jsonl")


def test_a_file_of_predictions_may_be_predicted_again(run: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    predict_run(run, path, first)
    predict_run(run, first, second)
    assert first.read_bytes() == second.read_bytes()


def test_missing_columns_are_named_with_a_cure_and_labels_needed_by_metrics_alone(run: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "good"}])
    assert predict_run(run, path, tmp_path / "out.csv") == 1
    with pytest.raises(DataError, match=r"has no column 'label'"):
        evaluate_run(run, path)
    write_jsonl(path, [{"Message": "good"}])
    with pytest.raises(DataError, match=r"rename .* to 'text': 'Message'"):
        predict_run(run, path, tmp_path / "out.csv")


def test_of_a_folder_the_file_that_is_predicted_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path, said = write_jsonl(tmp_path / "folder" / "test.jsonl", [{"text": "good"}]), list[str]()
    predict_run(run, tmp_path / "folder", tmp_path / "out.csv", say=said.append)
    assert [str(path) in line for line in said] == [True]
    predict_run(run, path, tmp_path / "out.csv", say=said.append)
    assert len(said) == 1


def test_cells_that_a_spreadsheet_would_run_are_escaped_with_a_warning(run: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"text": "=1+1 good", "@x": "-2"}, {"text": "bad", "@x": "+cmd"}])
    with pytest.warns(UserWarning, match=r"3 cells of .*out\.csv"):
        predict_run(run, tmp_path / "in.jsonl", tmp_path / "out.csv")
    written = cells_of(tmp_path / "out.csv")
    assert [(row["text"], row["'@x"]) for row in written] == [("'=1+1 good", "-2"), ("bad", "'+cmd")]
    predict_run(run, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert cells_of(tmp_path / "out.jsonl")[0]["text"] == "=1+1 good"


@pytest.mark.parametrize(
    ("rows", "out", "words"),
    [
        ('{"text": "good", "about": {"id": 1}}', "out.csv", r"row 1, column 'about'"),
        ('{"text": "good", "n": 1}\n{"text": "bad", "n": "one"}', "out.parquet", r"out.parquet .*write \.jsonl"),
        ('{"text": "good", "note": "\\ud800"}', "out.csv", r"out.csv .*write \.jsonl"),
    ],
    ids=["nested", "two types", "half a character"],
)
def test_rows_that_the_output_cannot_hold_are_refused_before_a_row_is_predicted(
    rows: str, out: str, words: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(rows + "\n")
    with patch("tsqlora.training.predict.predict_logits") as answers, pytest.raises(DataError, match=words):
        predict_run(run, tmp_path / "in.jsonl", tmp_path / out)
    answers.assert_not_called()
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_parquet_file_keeps_its_columns_and_their_types(run: Path, tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("text", pa.large_string()),
            ("about", pa.map_(pa.string(), pa.int32())),
            ("n", pa.int8()),
            ("kind", pa.dictionary(pa.int8(), pa.string())),
            ("empty", pa.struct([("a", pa.null())])),
            ("prediction", pa.int64()),
        ],
        metadata={"huggingface": "{}", "mine": "yes"},
    )
    rows = [
        {"text": text, "about": [("a", j)], "n": j, "kind": "k", "empty": {"a": None}, "prediction": j}
        for j, text in enumerate(["good", "", "bad"])
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "in.parquet")
    with pytest.warns(UserWarning, match="1 of 3 predictions are empty"):
        predict_run(run, tmp_path / "in.parquet", tmp_path / "out.parquet")
    before, after = (pq.read_table(tmp_path / name) for name in ("in.parquet", "out.parquet"))
    assert after.column_names == ["text", "about", "n", "kind", "empty", "prediction", "probability"]
    assert after.drop_columns(["prediction", "probability"]).equals(before.drop_columns("prediction"))
    predicted = after["prediction"].to_pylist()
    assert predicted[1] is None
    assert {predicted[0], predicted[2]} <= {*NAMES}
    # datasets would take the columns from its own list of them.
    assert after.schema.metadata == {b"mine": b"yes"}


@pytest.mark.parametrize("there", [True, False], ids=["beside", "elsewhere"])
def test_predictions_are_saved_where_the_output_cannot_be_written(there: bool, run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "good"}, {"text": ""}, {"text": "bad"}])
    out, elsewhere = tmp_path / "there" / "out.csv", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def answers(*_: Any, **how: Any) -> list[dict[str, Any]]:
        """Something takes the place of the output while rows are predicted."""
        if there:
            out.mkdir(parents=True)
        else:
            out.parent.write_text("a file")
        return [{"prediction": "yes", "probability": 0.75}, {"prediction": "no", "probability": 0.5}]

    with (
        patch("tsqlora.tasks.classification.Classification.predict", answers),
        patch("tempfile.tempdir", str(elsewhere)),
        pytest.warns(UserWarning, match="are empty"),
        pytest.raises(TsqLoraError, match="predictions are in") as raised,
    ):
        predict_run(run, data, out)
    assert raised.value.exit_code == 1
    (saved,) = (out.parent if there else elsewhere).glob("*.jsonl")
    assert str(saved) in str(raised.value)
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [
        {"row": 1, "prediction": "yes", "probability": 0.75},
        {"row": 2, "prediction": None, "probability": None},
        {"row": 3, "prediction": "no", "probability": 0.5},
    ]


def test_an_adapter_that_is_a_pickle_and_an_unfinished_run_are_refused(run: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(run, tmp_path / "run")
    (unfinished / "adapter" / "adapter_model.safetensors").rename(unfinished / "adapter" / "adapter_model.bin")
    with pytest.raises(DataError, match="a pickle, which can run code and is not opened"):
        open_run(unfinished)
    (unfinished / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"running"'))
    for use in (evaluate_run, open_run):
        with pytest.raises(DataError, match="is not finished"):
            use(unfinished)


def test_a_run_scores_other_rows_by_its_own_classes(run: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": row["text"], "label": "yes"} for row in make_rows(40)])
    override = [f"data.train={other}", f"data.validation={data_of(run)}", "data.test=null"]
    with pytest.warns(UserWarning, match="all 40 rows have the same label"):
        assert score_rows(run, tmp_path / "s.parquet", overrides=override).even
    write_jsonl(other, make_rows(60, seed=60, labels=NAMES)[:19:-1])
    scores = score_rows(run, tmp_path / "new" / "s.parquet", overrides=override)
    assert scores.labels.tolist() == [1, 0] * 20, "ids are those of the run, whatever comes first"


@pytest.mark.parametrize(("use_cpu", "device"), [(False, "cuda"), (True, "cpu")])
def test_models_are_put_on_the_accelerator_unless_told_not_to(
    use_cpu: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(
        {"model": {"path": "m"}, "data": {"train": "t"}, "training": {"use_cpu": True} if use_cpu else {}}
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for accelerator, expected in (("cuda", device), ("mps", "cpu")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda name=accelerator: torch.device(name))
        assert device_of(config).type == expected
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_of(config).type == "cpu"


def test_a_run_of_before_class_numbers_had_names_goes_on_with_numbers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = [{**row, "label": NAMES.index(row["label"])} for row in make_rows(60, seed=60, labels=NAMES)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    plain = {"quality": {"enabled": True, "fraction": 1.0}, "ranks": {"policy": "fixed", "mean": 2.0}}
    path = write_config(tmp_path / "c.yaml", run.parent / "model", tmp_path / "train.parquet", **plain)
    with monkeypatch.context() as before:
        before.setattr(sources, "class_names_of_parquet", lambda _: {})
        record = train(load_config(path), tmp_path / "run")
    assert record.labels == [0, 1]
    assert evaluate_run(tmp_path / "run", tmp_path / "train.parquet")["accuracy"] > 0.4
    assert evaluate_run(tmp_path / "run", overrides=["data.max_bad_rows=0.1"]) == record.metrics["validation"]
    predict_run(tmp_path / "run", tmp_path / "train.parquet", tmp_path / "predicted.jsonl")
    assert {row["prediction"] for row in cells_of(tmp_path / "predicted.jsonl")} <= {0, 1}
    assert explain_source(tmp_path / "run", 3)["text"] == rows[3]["text"]
    assert len(score_rows(tmp_path / "run", tmp_path / "scores.parquet")) == record.plan["rows"]["train"]
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda at: int(at.name.rpartition("-")[2])))
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "running"})
    )
    assert train(load_config(path), tmp_path / "run", resume=True).labels == [0, 1]


def test_columns_in_other_case_are_those_of_training(run: Path, tmp_path: Path) -> None:
    rows = [{" Text": row["text"], "LABEL": row["label"]} for row in make_rows(20, seed=20, labels=NAMES)]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    predict_run(run, path, tmp_path / "predicted.jsonl")
    predict_run(run, data_of(run), tmp_path / "expected.jsonl")
    predicted, expected = (cells_of(tmp_path / f"{name}.jsonl") for name in ("predicted", "expected"))
    assert [row["prediction"] for row in predicted] == [row["prediction"] for row in expected]
    assert [*predicted[0]] == [" Text", "LABEL", "prediction", "probability"]
    assert evaluate_run(run, path) == evaluate_run(run, data_of(run))


TASK, ROWS = get_task("sequence-classification"), samples(11, 3)


def unlabelled(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """As `collate`, of rows that must have no labels."""
    assert all("labels" not in row for row in rows)
    batch = collate([{**row, "labels": 0} for row in rows])
    return {name: value for name, value in batch.items() if name != "labels"}


def test_progress_ends_at_the_number_of_rows() -> None:
    updates: list[tuple[str, int, int]] = []
    compute = Compute(4, progress=lambda *args: updates.append(args))
    predict_logits(tiny_bert(), ROWS, unlabelled, task=TASK, phase="test", compute=compute)
    assert updates == [("test", 0, 11), ("test", 4, 11), ("test", 8, 11), ("test", 11, 11)]


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = tiny_bert()
    with torch.no_grad():
        broken.classifier.bias.fill_(torch.nan)
    with pytest.raises(TsqLoraError, match=r"not finite for 11 of 11 rows; lower training\.learning_rate"):
        predict_logits(broken, ROWS, unlabelled, task=TASK, compute=Compute(4))
