"""Runs from beginning to end: what they note, and that fixed ranks are plain LoRA."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainerCallback

from runs import make_rows, set_up, write_jsonl
from synchronisations import waits_of_ours
from tsqlora.adapter.files import read_adapter
from tsqlora.errors import SettingsError
from tsqlora.paper.budget import budget, used
from tsqlora.paper.slots import active_ranks, has_slots
from tsqlora.settings import Config, dump_config, load_config
from tsqlora.training import command as pipeline
from tsqlora.training.fit import fit
from tsqlora.training.job import load, method_of
from tsqlora.training.run import arguments, begin
from tsqlora.training.stop import StopCallback


def test_a_dry_run_and_the_run_count_the_same_trusted_rows(tmp_path: Path) -> None:
    rows, lines = make_rows(40), list[str]()
    set_up(tmp_path)
    trusted = write_jsonl(tmp_path / "train.jsonl", rows)
    job = load(load_config(tmp_path / "c.yaml", [f"data.trusted={trusted}"]), say=lines.append)
    assert 0 < len(job.data["trusted"]) < 40
    assert f"{len(job.data['trusted'])} trusted" in lines[0]


def test_a_run_need_not_end_with_an_epoch(tmp_path: Path) -> None:
    off = {"quality": {"enabled": False}, "ranks": {"policy": "fixed"}}
    set_up(tmp_path, training={"batch_size": 8, "epochs": 0.5}, **off)
    record = pipeline.train(load_config(tmp_path / "c.yaml"), tmp_path / "run")
    assert (record.status, record.plan["steps"]) == ("finished", 3)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()
    planned, trained = record.plan["passes"]["training"]["forward"], record.cost["training"].forward
    assert abs(planned - trained) < 8


# ------------------------------------------------------------------------------------------- fixed ranks


def fixed(folder: Path, *, mean: float = 4.0, **training: Any) -> Path:
    """A folder with settings of a run of three epochs, five steps each."""
    training = {"batch_size": 8, "epochs": 3, "bf16": False, "learning_rate": 0.01, "max_grad_norm": 0.0} | training
    off = {"enabled": False, "head_start": False}
    return set_up(folder, quality=off, ranks={"policy": "fixed", "mean": mean}, training=training)


def unfinished(run: Path) -> None:
    """Take a finished run back to its second checkpoint."""
    shutil.rmtree(run / "adapter")
    shutil.rmtree(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])))
    record = json.loads((run / "run.json").read_text()) | {"status": "running"}
    (run / "run.json").write_text(json.dumps(record))


def test_a_run_resumed_with_other_libraries_notes_which(tmp_path: Path) -> None:
    config, run = load_config(fixed(tmp_path) / "c.yaml"), tmp_path / "run"
    pipeline.train(config, run)
    unfinished(run)
    record = json.loads((run / "run.json").read_text())
    record["versions"]["torch"] = "2.1"
    (run / "run.json").write_text(json.dumps(record))
    (note,) = [note for note in pipeline.train(config, run, resume=True).notes if "resumed with others" in note]
    assert note.startswith("started with torch 2.1 and")


def test_a_run_with_fixed_ranks_is_peft_in_a_stock_trainer(tmp_path: Path) -> None:
    config = load_config(fixed(tmp_path, optim="adafactor") / "c.yaml")
    with patch("tsqlora.training.command.fit", side_effect=fit) as fitted:
        record = pipeline.train(config, tmp_path / "run")
    job, _, method = fitted.call_args.args[:3]
    assert (has_slots(job.model), method.ranks) == (False, None)
    assert set(record.ranks.values()) == set(record.plan["ranks"].values()) == {4}
    torch.manual_seed(config.training.seed)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
    twin = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))
    expected = {name: p.shape for name, p in twin.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in job.model.named_parameters() if p.requires_grad} == expected


def test_a_fractional_mean_is_a_rank_pattern_within_the_budget(tmp_path: Path) -> None:
    record = pipeline.train(load_config(fixed(tmp_path, mean=2.5) / "c.yaml"), tmp_path / "run")
    targets = read_adapter(tmp_path / "run" / "adapter").targets
    shapes = {name: (target.inputs, target.outputs) for name, target in targets.items()}
    assert record.ranks == {name: target.rank for name, target in targets.items()}
    assert set(record.ranks.values()) == {2, 3}
    left = budget(2.5, shapes) - used(record.ranks, shapes)
    assert 0 <= left < min(sum(shape) for shape in shapes.values())
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
    assert active_ranks(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")) == record.ranks


def test_a_step_that_changes_nothing_waits_for_the_device_once(tmp_path: Path) -> None:
    """The gradient is tested for finite numbers; everything else stays on the device."""
    job = load(load_config(fixed(tmp_path, save_strategy="no", logging_strategy="no") / "c.yaml"))
    args, method = arguments(job.config, tmp_path / "run"), method_of(job, tmp_path / "scores.parquet")
    job = job.with_adapter()
    record = begin(job, args, method)
    counts = CountWaits()
    with waits_of_ours() as counts.seen:
        fit(job, args, method, record, also=[StopCallback("advice"), counts], run=tmp_path)
    assert {len(step) for step in counts.steps[1:]} == {1}
    assert "training/nonfinite.py" in counts.steps[1][0]


class CountWaits(TrainerCallback):
    """The places that wait, by step, from the end of a step to the end of the next."""

    seen: list[str]

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self.before = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([place for place in self.seen[self.before :] if "/src/tsqlora/" in place])
        self.before = len(self.seen)


def test_a_saved_adapter_with_a_fault_is_said_and_a_resumed_run_from_which_step_it_goes_on(tmp_path: Path) -> None:
    config, lines = load_config(fixed(tmp_path, epochs=2) / "c.yaml"), list[str]()
    with (
        patch.object(pipeline, "faults_in", side_effect=lambda path: [f"{path}: not finite"]),
        pytest.warns(UserWarning, match="has a fault"),
    ):
        notes = pipeline.train(config, tmp_path / "run").notes
    assert f"{tmp_path / 'run' / 'adapter'}: not finite" in notes
    unfinished(tmp_path / "run")
    pipeline.train(config, tmp_path / "run", resume=True, say=lines.append)
    assert lines[1:] == ["goes on from step 5 of 10"]


def test_a_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    config = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    (tmp_path / "config.yaml").write_text(dump_config(Config.model_validate(config)))
    other = Config.model_validate(config | {"training": {"learning_rate": 1e-3}})
    with pytest.raises(SettingsError, match=r"other settings: training\.learning_rate was 0\.0005, and is 0\.001; use"):
        pipeline.train(other, tmp_path, resume=True)
