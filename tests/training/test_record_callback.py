"""run.json in a Trainer of the user's own: all that a report needs, from whichever callbacks there are."""

from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from peft import PeftModel
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

import tsqlora as tsq
from scoring import drawing
from stock import fails_at, make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.record import RunRecord
from tsqlora.run_dir import RECORD_FILE
from tsqlora.training.live_record import step_size

ROWS = moods()


def trained(folder: Path, *callbacks: Any, data: Any = None, model: PeftModel | None = None, **further: Any) -> Any:
    further = {"num_train_epochs": 4, "logging_strategy": "epoch"} | further
    if data is None:
        callbacks = (drawing(data := tsq.QualitySubset(ROWS, 1.0, seed=0)), *callbacks)
    trainer = make_trainer(model or slotted_bert(), data, folder, list(callbacks), **further)
    trainer.train()
    return trainer


def both(**further: Any) -> tuple[tsq.QualitySubset, list[Any]]:
    data = tsq.QualitySubset(ROWS, 0.5, seed=0)
    return data, [tsq.QualityCallback(data), paper.RankCallback(interval=2, **further)]


def test_a_trainers_record_has_what_its_callbacks_did(tmp_path: Path) -> None:
    data, callbacks = both()
    trainer = trained(tmp_path, *callbacks, data=data)
    record, (_, ranks) = RunRecord.load(tmp_path), callbacks
    assert record.status == "finished"
    assert record.rank_events == ranks.events != []
    assert record.ranks == ranks.final
    assert record.plan["ranks"].keys() == record.ranks.keys()
    assert (record.plan["rows"]["train"], record.plan["rows_an_epoch"]) == (len(ROWS), len(data))
    assert record.plan["steps"] == trainer.state.global_step
    assert record.quality["looks"] == callbacks[0].looks
    assert list(record.cost) == ["look", "ranks", "training"]
    assert record.cost["training"].forward == 4 * len(data)
    assert len(record.history) == 4
    assert record.settings["ranks"]["interval"] == 2
    assert record.settings["quality"]["fraction"] == 0.5
    assert record.now == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "scores.parquet"]


def test_evaluations_are_the_records_metrics_and_the_last_counts(tmp_path: Path) -> None:
    measure = {"evaluate_on": ROWS, "compute_metrics": lambda p: {"accuracy": 0.25}}
    trainer = trained(tmp_path, eval_strategy="epoch", **measure)
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    metrics = RunRecord.load(tmp_path).metrics["validation"]
    assert list(metrics) == ["accuracy", "loss"]
    assert metrics["loss"] == logs[-1]["eval_loss"]
    after = trainer.evaluate(moods(16, seed=5))
    assert RunRecord.load(tmp_path).metrics["validation"]["loss"] == after["eval_loss"]


def test_a_training_that_fails_leaves_a_record_that_says_so_and_has_a_report(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, fails_at("step_begin", 2))
    assert RunRecord.load(tmp_path).status == "running"
    assert tsq.report(tmp_path).path.exists()


def test_the_rows_of_a_step_follow_a_batch_size_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, use_cpu=True)
    state = TrainerState(train_batch_size=4)
    assert step_size(args, state) == 16
    args.auto_find_batch_size = True
    assert step_size(args, state) == 8
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert step_size(args, state) == 16
    cast(AcceleratorConfig, args.accelerator_config).split_batches = True
    assert step_size(args, state) == 8


def test_a_record_that_cannot_be_written_warns_and_the_training_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunRecord, "save", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.warns(UserWarning, match=RECORD_FILE):
        trained(tmp_path, num_train_epochs=1)


def test_batches_that_the_loader_drops_cost_nothing(tmp_path: Path) -> None:
    data = tsq.QualitySubset(moods(30), 1.0, seed=0)
    options = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}
    trained(tmp_path, drawing(data), data=data, **options)
    assert RunRecord.load(tmp_path).cost["training"].forward == 3 * 24
