"""tsq.train: a path, a mapping or sections give the run that the command line gives."""

import json
from pathlib import Path

import pytest

import tsqlora as tsq
from runs import set_up
from tsqlora.settings import Config


def test_settings_come_as_a_file_a_mapping_or_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fast = {"ranks": {"policy": "fixed", "mean": 2.0}, "quality": {"enabled": False, "head_start": False}}
    training = {"epochs": 1, "batch_size": 8, "save_strategy": "no"}
    set_up(tmp_path, rows=40, **fast, training=training)
    source = {"model": {"path": tmp_path / "model"}, "data": {"train": "train.jsonl", "max_length": 32}}
    runs = [
        tsq.train("c.yaml", data={"max_length": 32}, out=tmp_path / "first"),
        tsq.train({**fast, **source}, training=training),
        tsq.train(**fast, **source, training=training),
    ]
    assert runs[0] == tmp_path / "first"
    assert [run.parent.name for run in runs[1:]] == ["runs", "runs"]
    assert runs[2].name == f"{runs[1].name}-2"
    records = [json.loads((run / "run.json").read_text()) for run in runs]
    assert [record["data"]["max_length"] for record in records] == [32] * 3
    assert records[1]["metrics"] == records[2]["metrics"]


def test_a_section_beside_a_mapping_changes_only_its_own_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = list[Config]()
    monkeypatch.setattr("tsqlora.training.command.train", lambda settings, *_, **__: read.append(settings))
    settings = {"model": {"path": "m"}, "data": {"train": "rows.csv"}, "training": {"epochs": 7}}
    tsq.train(settings, training={"seed": 3}, out=tmp_path / "run")
    assert (read[0].training.epochs, read[0].training.seed) == (7, 3)
    assert settings["training"] == {"epochs": 7}


@pytest.mark.parametrize(
    ("sections", "key"),
    [({}, "model.path"), ({"modl": {}}, "modl"), ({"model": {"path": "m"}, "data": {"train": 3}}, "data.train")],
)
def test_what_is_wrong_is_named(sections: dict[str, dict[str, str]], key: str) -> None:
    with pytest.raises(tsq.SettingsError, match=key):
        tsq.train(**sections)
