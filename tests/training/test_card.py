"""A run's model card: metadata that the Hub reads, numbers that are the run's, nothing of this machine."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from made_runs import looks_of
from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.record import RunRecord
from tsqlora.settings import load_config
from tsqlora.training.command import train
from tsqlora.training.export import export, model_card
from tsqlora.training.job import TRUST, load


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    save_checkpoint(folder / "tiny-bert")
    write_jsonl(folder / "moods.jsonl", make_rows(60, labels=("no", "yes|no")))
    plain = {"quality": {"enabled": False, "fraction": 0.5}, "ranks": {"policy": "fixed", "mean": 2.0}}
    config = write_config(folder / "c.yaml", folder / "tiny-bert", folder / "moods.jsonl", **plain)
    train(load_config(config, ["model.trust_remote_code=true", "task.type=sequence-classification"]), folder / "run")
    return folder / "run"


def changed(run: Path, folder: Path, settings: dict[str, dict[str, Any]], **record: Any) -> Path:
    """What a card is made of, with these settings and entries of the record instead."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in settings.items():
        config[section] |= values
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | record))
    return folder


def test_the_hub_reads_what_the_run_measured(run: Path) -> None:
    text = (run / "adapter" / "README.md").read_text()
    assert text == model_card(run)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-classification"
    assert data["tags"] == ["tsqlora", "lora"]
    measured = RunRecord.load(run).metrics["validation"]
    (result,) = data["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == measured
    assert data["metrics"] == sorted(measured)


def test_the_text_has_results_data_and_how_to_load(run: Path) -> None:
    record, card = RunRecord.load(run), model_card(run)
    for shown in (
        "\n# tiny-bert, fine-tuned on moods.jsonl\n\nA LoRA adapter",
        "\n\n## How to load it\n\n```python\nfrom peft import PeftModel\n",
        'model = PeftModel.from_pretrained(base, "THIS-DIRECTORY")\n```\n\n## Results\n\n| rows | metric | value |\n',
        f"hash `{record.data['hash']}`, seed 0.\nTrained on a random 50% of the rows in each epoch.\nLook 1 at",
        "\nLabels: no, ",
        f"peft {record.versions['peft']}",
    ):
        assert shown in card
    assert any("trust_remote_code" in note and f"Note: {note}." in card for note in record.notes)
    assert str(run.parent) not in card, "paths are of this machine"


def test_what_a_stranger_wrote_is_text_and_not_markup(run: Path, tmp_path: Path) -> None:
    path = 'm"); import os #\n```\n<b>{{ 1 + 1 }}'
    labels = ["<script>alert(1)</script>", "a\n\n# b", "[x](javascript:1)"]
    card = model_card(changed(run, tmp_path, {"model": {"path": path}}, labels=labels, notes=["`x`\x1b[2J", "*y*"]))
    text = card.split("---", 2)[2]
    assert "<script>" not in text
    assert "<b>" not in text.replace('\\n```\\n<b>{{ 1 + 1 }}"', "")
    assert r"Labels: &lt;script&gt;alert(1)&lt;/script&gt;, a # b, \[x\](javascript:1)." in text
    assert r"Note: \`x\`\\x1b\[2J." in text
    assert r"Note: \*y\*." in text
    # What is to be copied names the model, and does nothing else.
    code = text.split("```python\n")[1].split("\n```\n")[0]
    called = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert {ast.unparse(name) for name in called} == {
        "AutoModelForSequenceClassification.from_pretrained",
        "PeftModel.from_pretrained",
    }


def test_the_card_of_a_cut_adapter_has_no_results(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST, "1")
    report = export(run, tmp_path / "cut", format="peft", keep=0.5)
    assert report["truncation"]
    card = ModelCard((tmp_path / "cut" / "README.md").read_text())
    assert "the result was not measured" in card.text
    assert not card.data.eval_results
    assert "## Results" not in card.text.splitlines()
    export(run, tmp_path / "whole", format="peft")
    assert (tmp_path / "whole" / "README.md").read_text() == model_card(run)


def test_the_revision_of_the_base_is_in_card_and_adapter(run: Path, tmp_path: Path) -> None:
    other = changed(run, tmp_path, {"model": {"revision": "v2"}})
    assert ', num_labels=2, revision="v2")' in model_card(other)
    job = load(load_config(other / "config.yaml"))
    assert job.with_adapter().model.peft_config["default"].revision == "v2"


def test_a_hub_id_is_named_as_base_and_as_data_and_a_moved_file_is_not(run: Path, tmp_path: Path) -> None:
    card = model_card(changed(run, tmp_path, {"model": {"path": "someone/model"}, "data": {"train": "someone/data"}}))
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("someone/model", ["someone/data"])
    assert 'from_pretrained("someone/model", num_labels=2)' in card
    result = data["model-index"][0]["results"][0]["dataset"]
    assert (result["type"], result.get("config")) == ("someone/data", None)
    for moved in ("~/mine/rows.jsonl", "/home/me/rows.csv", "rows/mine.parquet", "rows:1.csv"):
        card = model_card(changed(run, tmp_path, {"data": {"train": moved}}))
        assert "datasets" not in ModelCard(card).data.to_dict()


def test_a_configuration_is_not_part_of_the_data_sets_id(run: Path, tmp_path: Path) -> None:
    card = model_card(changed(run, tmp_path, {"data": {"train": "nyu-mll/glue:mrpc[train[:90%]]"}}))
    data = ModelCard(card).data.to_dict()
    assert data["datasets"] == ["nyu-mll/glue"]
    result = data["model-index"][0]["results"][0]["dataset"]
    assert (result["type"], result["config"]) == ("nyu-mll/glue", "mrpc")


@pytest.mark.parametrize(
    ("format", "library", "shown"),
    [
        ("merged", "transformers", "AutoModelForSequenceClassification.from_pretrained("),
        ("gguf", "peft", "--lora adapter.gguf"),
    ],
)
def test_an_export_says_how_to_load_it(format: str, library: str, shown: str, run: Path) -> None:
    card = model_card(run, format=format)
    assert ModelCard(card).data.to_dict()["library_name"] == library
    assert shown in card


USED = {"enabled": True, "used": True, "fraction": 0.5}


@pytest.mark.parametrize(
    ("quality", "shown"),
    [
        (USED | {"scores": {"draw": "softmax"}}, "50% of the rows in each epoch, drawn by quality (default)"),
        (USED | {"scores": {"draw": "even", "noise": {"evident": True}}}, "whose label seemed right"),
        (USED | {"scores": {"draw": "even", "noise": None}}, "a random 50% of the rows in each epoch: their quality"),
        (USED | {"looks": looks_of(60)}, "Look 1 at all rows, before step 1: A head fitted on 60 rows replaced"),
        (USED | {"used": False}, "a random 50% of the rows in each epoch: quality was not used"),
        ({"enabled": False, "fraction": 1.0}, "Trained on every row in each epoch."),
    ],
)
def test_quality_that_was_not_used_is_not_claimed(
    quality: dict[str, Any], shown: str, run: Path, tmp_path: Path
) -> None:
    assert shown in model_card(changed(run, tmp_path, {}, quality=quality))
