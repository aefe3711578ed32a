"""A run that begins at an adapter has its update, its ranks and its head, and refuses what it cannot go on from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from loras import lora_config, save_lora, tiny_llama
from runs import make_rows, set_up, write_config, write_jsonl
from tsqlora.adapter.files import read_adapter, write_adapter
from tsqlora.adapter.verify import logits
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.paper.slots import active_ranks
from tsqlora.record import RunRecord
from tsqlora.settings import Config, load_config
from tsqlora.training.command import dry_run, train
from tsqlora.training.job import load, open_run, with_start
from tsqlora.training.lora import mean_rank, read_start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, rows of two classes, and an adapter that is not ours: ranks 2 and 3, three scales, a head."""
    folder = set_up(tmp_path_factory.mktemp("start"))
    save_classifier(folder / "adapter", folder / "model")
    return folder


def save_classifier(folder: Path, model: Path, *, labels: int = 2, **options: Any) -> Path:
    arguments: dict[str, Any] = {
        "task_type": "SEQ_CLS",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query", "value", "output.dense"],
        "rank_pattern": {"value": 3},
        "alpha_pattern": {"query": 1},
    }
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
    return save_lora(folder, base, lora_config(**(arguments | options)))


def config_of(place: Path, start: Path | str | None = None, **sections: Any) -> Config:
    """Settings of `runs.write_config` without those that the adapter decides."""
    path = write_config(place / "c.yaml", place / "model", place / "train.jsonl", **sections)
    settings = yaml.safe_load(path.read_text())
    for section, key in (("ranks", "mean"), ("adapter", "alpha")):
        if key not in sections.get(section, {}):
            del settings[section][key]
    settings["adapter"]["init_from"] = str(start or place / "adapter")
    path.write_text(yaml.safe_dump(settings))
    return with_start(load_config(path))


def test_a_run_begins_with_the_adapters_update_ranks_and_head(place: Path) -> None:
    config = config_of(place)
    source = read_adapter(place / "adapter")
    job = load(config)
    model = job.with_adapter().model
    assert active_ranks(model) == {name: target.rank for name, target in source.targets.items()}
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2)
    theirs = logits(PeftModel.from_pretrained(base, str(place / "adapter")))
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-5)


def test_settings_say_what_the_adapter_decided(place: Path) -> None:
    config, source = config_of(place), read_start(place / "adapter")
    assert config.ranks.mean == pytest.approx(mean_rank(source))
    assert config.adapter.alpha / config.ranks.mean == pytest.approx(2.0), "output.dense's, the commonest"
    assert config.adapter.target_modules == sorted(source.targets)
    assert config_of(place, ranks={"max": 3}).ranks.max == 3
    assert with_start(config) == config


def test_a_run_goes_on_from_a_run(place: Path, tmp_path: Path) -> None:
    write_config(place / "first.yaml", place / "model", place / "train.jsonl")
    train(load_config(place / "first.yaml"), tmp_path / "first")
    config = config_of(place, tmp_path / "first")
    begun = load(config).with_adapter().model
    torch.testing.assert_close(logits(begun), logits(open_run(tmp_path / "first").model), rtol=1e-4, atol=1e-5)
    record = train(config, tmp_path / "second")
    assert record.notes[0].startswith(f"continues {tmp_path / 'first'}: ")
    assert record.plan["ranks"] == RunRecord.load(tmp_path / "first").ranks
    assert not any("its head must be" in note for note in record.notes), "a run's classes are known"
    again = train(load_config(tmp_path / "second" / "config.yaml"), tmp_path / "second", resume=True)
    assert again.status == "finished"


def test_ranks_stay_where_nothing_moves_them(place: Path, tmp_path: Path) -> None:
    config = config_of(place, quality={"enabled": False}, ranks={"policy": "fixed"})
    record = train(config, tmp_path / "run")
    ranks = {name: target.rank for name, target in read_adapter(place / "adapter").targets.items()}
    assert record.plan["ranks"] == record.ranks == ranks
    assert record.plan["budget"] == read_adapter(place / "adapter").parameters
    assert "its head must be for these classes, in this order: 0, 1" in record.notes


def test_a_head_that_did_not_come_is_new_and_saved(place: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "a", place / "model", target_modules=["query"], rank_pattern={})
    source = read_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "bare").mkdir()
    write_adapter(replace(source, saved={}, config={**config, "modules_to_save": None}), tmp_path / "bare")
    record = train(config_of(place, tmp_path / "bare", quality={"enabled": False}), tmp_path / "run")
    assert "that adapter has no head: the head is new" in record.notes
    assert "classifier" in read_adapter(tmp_path / "run" / "adapter").heads()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"use_dora": True}, UnsupportedError, "the adapter has use_dora, which a training that goes on cannot hold"),
        ({"labels": 3}, DataError, r"classifier.* has shape \(3.*head was trained on other classes"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "the adapter has init_lora_weights=pissa"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(
    options: dict[str, Any], kind: type[TsqLoraError], message: str, place: Path, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "a", place / "model", **options)
    with pytest.raises(kind, match=message):
        dry_run(config_of(place, tmp_path / "a"))


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "a", tiny_llama(), lora_config())
    with pytest.raises(DataError, match=r"the base model has no module model\.layers\.0\.self_attn\.k_proj"):
        dry_run(config_of(place, tmp_path / "a"))
    with pytest.raises(DataError, match="nowhere has no"):
        config_of(place, "nowhere")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ranks": {"mean": 6.0}}, "ranks.mean is 6.0"),
        ({"adapter": {"alpha": 1.0}}, "adapter.alpha is 1.0"),
        ({"adapter": {"target_modules": ["query"]}}, "adapter.target_modules is"),
        ({"ranks": {"max": 2}}, "ranks.max is 2, and adapter.init_from has a rank of 3; raise it"),
    ],
)
def test_settings_that_the_adapter_decides_are_not_set(sections: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        config_of(place, **sections)


def test_a_default_that_is_written_out_is_no_answer(place: Path) -> None:
    """As `tsqlora init` writes it."""
    defaults = {"ranks": {"mean": 8.0, "max": None}, "adapter": {"alpha": 16.0, "target_modules": "all-linear"}}
    without, written = config_of(place), config_of(place, **defaults)
    assert (written.ranks.mean, written.adapter) == (without.ranks.mean, without.adapter)


def test_a_run_of_other_classes_is_refused(place: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other.jsonl", make_rows(80, labels=("no", "yes")))
    sections: Any = {"quality": {"enabled": False}, "ranks": {"policy": "fixed"}, "training": {"max_steps": 2}}
    path = write_config(tmp_path / "c.yaml", place / "model", tmp_path / "other.jsonl", **sections)
    train(load_config(path), tmp_path / "first")
    with pytest.raises(DataError, match="first was trained on no, yes"):
        dry_run(config_of(place, tmp_path / "first"))
