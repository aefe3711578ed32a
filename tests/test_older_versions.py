"""Adapters, runs, scores and checkpoints of version 0.1 (9115ea2) and 0.2 (ec5d948) still load, or say what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from runs import run_cli
from tsqlora.auditing.scores import Scores
from tsqlora.cli import main
from tsqlora.training.predict import predict_run

WRITTEN = Path(__file__).parent / "fixtures"
CURES = {"v0.1": "quality.reference was removed", "v0.2": "resume with that version, or start again"}


@pytest.fixture(params=CURES)
def older(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which that version trained; its config names the model and the rows by relative paths."""
    folder = tmp_path / request.param
    shutil.copytree(WRITTEN / request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_plain_peft_loads_an_older_adapter(older: Path) -> None:
    expected = rows_of(older / "predicted.jsonl")
    base = AutoModelForSequenceClassification.from_pretrained(older / "model", num_labels=2)
    model = PeftModel.from_pretrained(base, older / "run" / "adapter").eval()
    tokens = AutoTokenizer.from_pretrained(older / "model")([row["text"] for row in expected], padding=True)
    with torch.no_grad():
        logits = model(**{name: torch.tensor(values) for name, values in tokens.items()}).logits
    probabilities = logits.softmax(-1).max(-1)
    assert probabilities.indices.tolist() == [row["prediction"] for row in expected]
    assert probabilities.values.tolist() == pytest.approx([row["probability"] for row in expected], abs=1e-5)


def test_an_older_run_predicts_as_it_did(older: Path) -> None:
    predict_run(older / "run", older / "new.jsonl", older / "again.jsonl")
    expected, again = rows_of(older / "predicted.jsonl"), rows_of(older / "again.jsonl")
    assert [row["prediction"] for row in again] == [row["prediction"] for row in expected]
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in expected], abs=1e-5)


def test_older_scores_load(older: Path) -> None:
    scores = Scores.load(older / "run" / "scores.parquet")
    assert len(scores) == len(rows_of(older / "train.jsonl")) - 6  # a tenth is held out
    assert scores.kept.any()


def test_reports_of_older_runs_are_written(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(capsys, "report", older / "run")[0] == 0
    assert run_cli(capsys, "export", older / "run", "--format", "universal", "--out", older / "universal")[0] == 0
    assert run_cli(capsys, "evaluate", older / "run", "--data", older / "new.jsonl")[0] == 0


def test_an_older_checkpoint_goes_on_or_says_what_to_do(
    older: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 0 with an adapter, or exit 2 with the cure; never other rows in silence."""
    run = older / "run"
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-24")
    record = json.loads((run / "run.json").read_text()) | {"status": "running"}
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("sys.argv", ["tsqlora", "train", str(run / "config.yaml"), "--out", str(run), "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    if ended.value.code:
        assert ended.value.code == 2
        assert CURES[older.name] in capfd.readouterr().err
    else:
        assert (run / "adapter" / "adapter_model.safetensors").exists()
