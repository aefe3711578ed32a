"""Which models read answers, and what is said before they do."""

import shutil
from pathlib import Path

import pytest

from tsqlora.run import text_answers
from tsqlora.run.text_answers import no_judge


def test_a_model_without_weights_here_reads_no_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert no_judge(str(tmp_path)) == f"the weights of {tmp_path} are not on this machine"
    assert "not on this machine" in no_judge("someone/model")


def test_a_model_that_memory_cannot_hold_reads_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert no_judge(str(tmp_path)) == ""
    monkeypatch.setattr(text_answers, "MARGIN", shutil.disk_usage("/").total)
    assert "give --model a smaller one with the same tokenizer" in no_judge(str(tmp_path))
