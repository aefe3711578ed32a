"""One training of a job: its arguments, and what is measured at its end."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

import tsqlora as tsq
from byte_tokenizers import CHATML, byte_tokenizer
from models import samples, tiny_bert
from runs import make_rows, write_jsonl
from tables import read_as, rows_of, table_with
from tsqlora import paper
from tsqlora.model.named import trained_task
from tsqlora.record import RunRecord
from tsqlora.rows.chat import find_format
from tsqlora.rows.splits import read_data
from tsqlora.rows.tokens import tokenise_generation
from tsqlora.settings import Config
from tsqlora.tasks import get_task
from tsqlora.training import run as fit
from tsqlora.training.job import Method, scoring_rule
from tsqlora.training.run import arguments, plan, shown_samples, without_effect


def test_rows_that_are_trained_on_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train", "trusted", "validation", "test")
    tables = {name: table_with([{"input_ids": [j], "labels": 0}]) for j, name in enumerate(names)}
    first = lambda rows, **_: {"first": rows[0]["input_ids"][0]}  # noqa: E731
    predictor = SimpleNamespace(metrics=first, text_metrics=lambda *_, **__: {})
    monkeypatch.setattr(fit, "predictor_of", lambda *_: predictor)
    job: Any = SimpleNamespace(data=tables, task=get_task("regression"))
    args: Any = None
    record = RunRecord("running", 0, "sequence-classification", None, {}, {})
    fit.measure(job, record, args, None)
    assert record.metrics == {"validation": {"first": 2}, "test": {"first": 3}}


def test_saving_the_best_checkpoint_alone_evaluates_every_epoch(tmp_path: Path) -> None:
    def args_of(**training: Any) -> Any:
        sections = {"model": {"path": "m"}, "data": {"train": "t"}, "training": {"save_strategy": "best", **training}}
        return fit.arguments(Config.model_validate(sections), tmp_path)

    alone, own = args_of(), args_of(metric_for_best_model="accuracy", eval_strategy="steps", eval_steps=5)
    assert (alone.eval_strategy, alone.metric_for_best_model, alone.greater_is_better) == ("epoch", "loss", False)
    assert (own.eval_strategy, own.metric_for_best_model) == ("steps", "accuracy")


@pytest.mark.parametrize(
    ("evident", "own_file", "says"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_metrics_of_held_out_rows_say_how_wrong_their_labels_are(
    evident: bool, own_file: bool, says: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", make_rows(40)))
    data = read_data(path, path if own_file else None, None, validation_fraction=0.2, seed=0, **read_as("class"))
    predictor = SimpleNamespace(metrics=lambda *_, **__: {"accuracy": 0.85, "loss": 0.4})
    monkeypatch.setattr(fit, "predictor_of", lambda *_: predictor)
    record = RunRecord("training", 0, "sequence-classification", [0, 1], {}, {})
    record.quality = {"looks": [{"noise": {"evident": evident, "rate": 0.1 if evident else 0.0, "low": 0, "high": 1}}]}
    job: Any = SimpleNamespace(data=data, task=get_task("regression"))
    fit.measure(job, record, SimpleNamespace(), None)  # pyright: ignore[reportArgumentType]
    assert any("accuracy 0.850" in note and "10% of their labels" in note for note in record.notes) == says


def settings(**sections: Mapping[str, Any]) -> Config:
    required = {"model": {"path": "a/model"}, "data": {"train": "rows.jsonl"}}
    training = {"epochs": 6, "batch_size": 8, "bf16": False} | dict(sections.pop("training", {}))
    return Config.model_validate(
        {**required, "ranks": {"policy": "tsqlora", "interval": 4}, "training": training, **sections}
    )


def planned(
    config: Config, model: PeftModel, *, rows: int = 100, validation: int = 10, **quality: Any
) -> dict[str, Any]:
    splits = {name: table_with(samples(n, 2)) for name, n in (("train", rows), ("validation", validation))}
    q, r = config.quality, config.ranks
    data = tsq.QualitySubset(splits["train"].samples, q.fraction)
    scored = tsq.QualityCallback(data, rule=replace(scoring_rule(config), **quality))
    ranks = paper.RankCallback(r.interval, samples=20) if r.moves else None
    args = arguments(config, Path("nowhere"))
    job: Any = SimpleNamespace(
        config=config, task=trained_task(config), model=model, data=splits, train=splits["train"]
    )
    return plan(job, args, Method(data, scored, ranks))


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return paper.wrap(tiny_bert(num_labels=2, dtype=torch.float32), mean_rank=8)


@pytest.mark.parametrize(("rows", "batch_size", "accumulation"), [(100, 7, 3), (9, 8, 4), (101, 50, 2)])
def test_steps_are_those_of_the_drawn_rows(rows: int, batch_size: int, accumulation: int, model: PeftModel) -> None:
    further = {"epochs": 12, "batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    config = settings(training=further, ranks={"policy": "fixed"})
    result = planned(config, model, rows=rows)
    half = math.ceil(rows / 2)
    drawn = [range(half)[start : start + batch_size] for start in range(0, half, batch_size)]
    assert result["rows_an_epoch"] == sum(map(len, drawn))
    assert result["steps"] == 12 * math.ceil(len(drawn) / accumulation)


@pytest.mark.parametrize(
    ("training", "epochs", "steps", "rows"),
    [
        ({"epochs": 0.5}, 1, 4, 29),  # 50 rows are 7 batches
        ({"epochs": 1.5}, 2, 11, 79),
        ({"max_steps": 3}, 1, 3, 21),
        ({"max_steps": 20, "epochs": 0.5}, 3, 20, 143),
    ],
)
def test_steps_that_fill_no_epoch_are_planned_too(
    training: dict[str, Any], epochs: int, steps: int, rows: int, model: PeftModel
) -> None:
    result = planned(
        settings(training=training, quality={"enabled": False, "head_start": False}, ranks={"policy": "fixed"}), model
    )
    assert (result["epochs"], result["steps"]) == (epochs, steps)
    assert result["passes"] == {"training": {"forward": rows, "backward": rows}}


@pytest.mark.parametrize(
    ("quality", "look"),
    [({}, (100, 0)), ({"preset": "paper"}, (100 + 2 * 100 + 2 * 100, 100 + 100))],
)
def test_rows_budget_and_parameters_are_the_models_and_passes_are_counted_by_phase(
    quality: dict[str, Any], look: tuple[int, int], model: PeftModel
) -> None:
    result = planned(settings(quality=quality), model)
    assert result["rows"] == {"train": 100, "validation": 10}
    assert set(result["ranks"].values()) == {8}
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert result["budget"] == adapters // 2, "half of the slots are active"
    head = sum(p.numel() for p in model.base_model.model.classifier.parameters()) // 2
    assert result["trainable"] == result["budget"] + head
    assert result["passes"]["look"] == {"forward": look[0], "backward": look[1]}
    assert result["passes"]["ranks"] == {"forward": 20, "backward": 20}
    assert result["passes"]["training"] == {"forward": 300, "backward": 300}


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"ranks": {"policy": "fixed"}}, []),
        ({"ranks": {"policy": "fixed", "interval": 4}}, ["ranks.interval"]),
        ({"quality": {"enabled": False, "fraction": 0.2, "preset": "paper"}}, ["quality.preset"]),
        ({"quality": {"preset": "paper"}, "training": {"disable_tqdm": True}}, []),
        ({"training": {"disable_tqdm": False}}, ["training.disable_tqdm"]),
    ],
)
def test_settings_without_effect_are_result(sections: dict[str, Any], keys: list[str], model: PeftModel) -> None:
    config = settings(**sections)
    assert [note.partition(" ha")[0] for note in without_effect(config)] == keys
    assert planned(config, model)["without_effect"] == without_effect(config)


def shown(row: dict, *, seq2seq: bool = False, merges: tuple = (), chat: str | None = None) -> str:
    tokenizer = byte_tokenizer(merges=merges, chat_template=chat)
    format = find_format(list(row), source="a.jsonl")
    split = tokenise_generation(rows_of(row), format, tokenizer, max_length=4000, seq2seq=seq2seq)
    return shown_samples(tokenizer, split)


def test_the_whole_text_and_that_of_the_targets_are_shown() -> None:
    assert shown({"prompt": "2 + 2 =", "completion": " 4"}) == (
        "sample 1: 11 tokens\n<s>2 + 2 = 4</s>\nwith a loss: 3 tokens\n 4</s>\n"
    )
    assert shown({"prompt": "ab", "completion": "c"}, seq2seq=True) == (
        "sample 1: 3 tokens\n<s>ab\nwith a loss: 3 tokens\n<s>c</s>\n"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    learned = shown({"messages": turns}, chat=CHATML).partition("with a loss")[2]
    assert learned.count("b<|im_end|>") == 2
    assert "user" not in learned


def test_long_texts_are_shortened_and_control_characters_are_not_printed() -> None:
    text = shown({"prompt": "a" * 1000 + "\x1b[31m", "completion": "c"})
    assert len(text) < 800
    assert " … " in text
    assert "\x1b" not in text
