"""A run's model card: metadata that the Hub reads, numbers that are the run's, nothing of this machine."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.run.card import model_card, write_card
from tsqlora.run.config import load_config
from tsqlora.run.export import export
from tsqlora.run.job import load, with_slots
from tsqlora.run.train import train
from tsqlora.training.record import RunRecord


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    save_checkpoint(folder / "tiny-bert")
    write_jsonl(folder / "moods.jsonl", make_rows(60, labels=("no", "yes|no")))
    plain = {"quality": {"enabled": False, "fraction": 0.5}, "ranks": {"policy": "fixed", "mean": 2.0}}
    config = write_config(folder / "c.yaml", folder / "tiny-bert", folder / "moods.jsonl", **plain)
    train(load_config(config), folder / "run")
    return folder / "run"


def test_the_hub_reads_what_the_run_measured(run: Path, tmp_path: Path) -> None:
    write_card(run, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-classification"
    assert data["tags"] == ["tsqlora", "lora"]
    measured = RunRecord.load(run).metrics["validation"]
    (result,) = data["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == measured
    assert data["metrics"] == sorted(measured)


def test_a_runs_adapter_has_its_card(run: Path) -> None:
    assert (run / "adapter" / "README.md").read_text() == model_card(run)


def test_the_text_has_ranks_costs_data_and_how_to_load(run: Path) -> None:
    record, card = RunRecord.load(run), model_card(run)
    for shown in (
        "# tiny-bert, fine-tuned on moods.jsonl",
        "| attention.self.query |  | 2 | 2 |",
        f"hash `{record.data['hash']}`, seed 0",
        "Trained on a random 50% of the rows in each epoch.",
        "Labels: no, yes|no.",
        'model = PeftModel.from_pretrained(base, "THIS-DIRECTORY")',
        f"| training | {record.cost['training'].seconds:.1f} | {record.cost['training'].forward:,} |",
        f"peft {record.versions['peft']}",
    ):
        assert shown in card


def test_what_a_stranger_wrote_is_text_and_not_markup(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["labels"] = ["<script>alert(1)</script>", "a\n\n# b", "[x](javascript:1)"]
    record["notes"] = ["`x`\x1b[2J", "*y*"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["path"] = 'm"); import os #\n```\n<b>'
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    card = model_card(tmp_path / "run")
    text = card.split("---", 2)[2]
    assert "<script>" not in text
    assert "<b>" not in text.replace('\\n```\\n<b>"', "")
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


def test_of_an_adapter_that_was_cut_no_results_and_no_ranks_are_told(run: Path, tmp_path: Path) -> None:
    report = export(run, tmp_path / "cut", format="peft", mean_rank=1.0)
    assert report["truncation"]
    card = ModelCard((tmp_path / "cut" / "README.md").read_text())
    assert "Its ranks were cut after training, and nothing was measured since." in card.text
    assert not card.data.eval_results
    assert not {"## Results", "## Ranks"} & set(card.text.splitlines())
    export(run, tmp_path / "whole", format="peft")
    assert (tmp_path / "whole" / "README.md").read_text() == model_card(run)


def test_the_revision_of_the_base_is_in_card_and_adapter(run: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["revision"] = "v2"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    assert ', num_labels=2, revision="v2")' in model_card(tmp_path)
    job = load(load_config(tmp_path / "config.yaml"))
    assert with_slots(job.config, job.pretrained).peft_config["default"].revision == "v2"


def test_nothing_of_this_machine_is_told(run: Path) -> None:
    assert str(run.parent) not in model_card(run)


@pytest.mark.parametrize("moved", ["~/mine/rows.jsonl", "/home/me/rows.csv", "rows/mine.parquet"])
def test_a_file_that_was_moved_is_no_data_set_of_the_hub(moved: str, run: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"] = moved
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    assert "datasets" not in ModelCard(model_card(tmp_path)).data.to_dict()


def test_a_hub_id_is_named_as_base_and_as_data(run: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["path"], settings["data"]["train"] = "someone/model", "someone/data"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    data = ModelCard(model_card(tmp_path)).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("someone/model", ["someone/data"])
    assert 'from_pretrained("someone/model", num_labels=2)' in model_card(tmp_path)


@pytest.mark.parametrize(
    ("format", "library", "shown"),
    [
        ("merged", "transformers", "AutoModelForSequenceClassification.from_pretrained("),
        ("gguf", "peft", "--lora adapter.gguf"),
    ],
)
def test_what_was_exported_says_how_it_is_loaded(format: str, library: str, shown: str, run: Path) -> None:
    card = model_card(run, format=format)
    assert ModelCard(card).data.to_dict()["library_name"] == library
    assert shown in card
    assert ("## Ranks" in card) == (format != "merged")


def test_that_code_of_the_model_was_run_is_told(run: Path) -> None:
    folder = run.parent
    plain: dict[str, Any] = {"quality": {"enabled": False, "fraction": 0.5}, "ranks": {"policy": "fixed", "mean": 2.0}}
    config = write_config(folder / "t.yaml", folder / "tiny-bert", folder / "moods.jsonl", **plain)
    record = train(load_config(config, ["model.trust_remote_code=true", "training.epochs=1"]), folder / "trusting")
    told = "code that came with the model was run: model.trust_remote_code was true"
    assert told in record.notes
    assert f"Note: {told}." in model_card(folder / "trusting")


def test_quality_that_was_refused_is_not_claimed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    record = json.loads((run / "run.json").read_text())
    for quality, told in (
        (
            {"enabled": True, "used": True, "fraction": 0.5, "scores": {"draw": "softmax"}},
            "50% of the rows in each epoch, drawn by quality (default)",
        ),
        (
            {"enabled": True, "used": True, "fraction": 0.5, "scores": {"draw": "even", "noise": {"evident": True}}},
            "50% of the rows in each epoch, at random among those whose label did not seem wrong",
        ),
        (
            {"enabled": True, "used": True, "fraction": 0.5, "scores": {"draw": "even", "noise": None}},
            "a random 50% of the rows in each epoch: their quality gave no reason to draw otherwise",
        ),
        (
            {"enabled": True, "used": False, "fraction": 0.5},
            "a random 50% of the rows in each epoch: quality was not used",
        ),
        ({"enabled": False, "fraction": 1.0}, "every row in each epoch"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(record | {"quality": quality, "notes": ["mind this"]}))
        assert f"Trained on {told}." in model_card(tmp_path)
        assert "Note: mind this." in model_card(tmp_path)
