"""The first hour of a new user, step by step; `.ci/lowest` plays it again with the lowest versions."""

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

import tsqlora as tsq
from runs import make_rows, save_checkpoint
from tsqlora import paper
from words import llama, tokenizer

ROWS, CLASSES = 400, {0: "übel", 1: "schön"}


def tsqlora(folder: Path, *arguments: object) -> str:
    """What the command prints; it must exit with 0."""
    command = [sys.executable, "-m", "tsqlora.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an export of a spreadsheet: semicolons, cp1252, a hundredth without a text, one without a label."""
    folder = tmp_path_factory.mktemp("first_hour")
    save_checkpoint(folder / "model")
    with (folder / "rows.csv").open("w", newline="", encoding="cp1252") as file:
        out = csv.writer(file, delimiter=";")
        out.writerow(["Nr", "Text", "Label"])
        for j, row in enumerate(make_rows(ROWS)):
            label = "" if j == 7 else CLASSES[row["label"]]
            out.writerow([j, "" if j % 100 == 50 else row["text"], label])
    return folder


def test_a_dirty_table_from_audit_to_predictions(table: Path) -> None:
    tsqlora(table, "audit", "rows.csv", "--model", "model", "--out", "audit")
    assert (table / "audit" / "suspects.csv").exists()
    tsqlora(table, "train", "--model", "model", "--data", "rows.csv", "--out", "run", "--set", "training.epochs=1")
    record = json.loads((table / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert any("5" in note and "rows.csv" in note for note in record["notes"]), record["notes"]
    if find_spec("plotly"):
        tsqlora(table, "report", "run")
        assert (table / "run" / "report.html").exists()
    tsqlora(table, "export", "run", "--format", "merged", "--out", "merged")
    tsqlora(table, "doctor", "run")
    tsqlora(table, "predict", "run", "--data", "rows.csv", "--out", "predicted.csv")
    with (table / "predicted.csv").open(newline="", encoding="utf-8") as file:
        predicted = list(csv.DictReader(file))
    assert len(predicted) == ROWS
    assert {row["prediction"] for row in predicted} <= {*CLASSES.values(), ""}


def test_a_stock_trainer_with_one_epoch_and_early_stopping(table: Path) -> None:
    words = AutoTokenizer.from_pretrained(table / "model")
    rows = Dataset.from_list(make_rows(ROWS)).rename_column("label", "labels")
    rows = rows.map(lambda row: words(row["text"]), remove_columns=["text"])
    model = tsq.wrap(AutoModelForSequenceClassification.from_pretrained(table / "model"), mean_rank=4)
    data = tsq.QualitySubset(rows, fraction=0.5, seed=0)
    args = TrainingArguments(
        str(table / "trainer"),
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        report_to="none",
        use_cpu=True,
    )
    callbacks = [tsq.QualityCallback(data), paper.RankCallback(), EarlyStoppingCallback(1)]
    trainer: Any = Trainer(
        model,
        args,
        data_collator=DataCollatorWithPadding(words),
        train_dataset=data,
        eval_dataset=rows.select(range(40)),
        callbacks=callbacks,
    )
    trainer.train()
    model.save_pretrained(str(table / "adapter"))
    assert (table / "adapter" / "adapter_model.safetensors").exists()
    assert (table / "trainer" / "run.json").exists()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")  # TRL sets it by this name
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:hidden states do not separate trusted rows from the others")
@pytest.mark.parametrize("packing", [False, True])
def test_an_sft_trainer_with_its_defaults_and_packed(table: Path, packing: bool) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    pool = [{"text": " ".join(f"w{j * k % 40}" for k in range(4 + j % 6))} for j in range(80)]
    model, words = tsq.wrap(llama(), mean_rank=4), tokenizer()
    chosen = tsq.select(model, Dataset.from_list(pool), processing_class=words, trusted=pool[:16], fraction=0.5)
    args = trl.SFTConfig(
        output_dir=str(table / f"sft{packing}"),
        packing=packing,
        max_length=32,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    args.max_steps = 3
    trl.SFTTrainer(model, args, train_dataset=chosen, processing_class=words).train()
