"""What a run notes of how it went."""

from pathlib import Path
from typing import Any

import pytest

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.run import train as pipeline
from tsqlora.run.config import load_config


def test_a_run_resumed_with_other_libraries_notes_which() -> None:
    before = {"torch": "2.12", "peft": "0.21"}
    assert pipeline.other_versions(before, before) == []
    (note,) = pipeline.other_versions(before, {"torch": "2.13", "peft": "0.21"})
    assert note.startswith("begun with torch 2.12 and resumed with others")


@pytest.mark.parametrize(("training", "steps"), [({"epochs": 0.5}, 3), ({"max_steps": 6, "epochs": 9}, 6)])
def test_a_run_need_not_end_with_an_epoch(training: dict[str, Any], steps: int, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", make_rows(80))
    off = {"quality": {"enabled": False}, "ranks": {"policy": "fixed"}}
    path = write_config(
        tmp_path / "c.yaml", save_checkpoint(tmp_path / "model"), data, training={"batch_size": 8} | training, **off
    )
    record = pipeline.train(load_config(path), tmp_path / "run")
    assert (record.status, record.plan["steps"]) == ("finished", steps)
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{steps}").is_dir()
    planned, trained = record.plan["passes"]["training"]["forward"], record.cost["training"].forward
    assert abs(planned - trained) < 8
