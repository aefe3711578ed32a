"""The plan counts what a run will do, and refuses what cannot be done."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import tsqlora as tsq
from models import samples, tiny_bert
from tsqlora.data.samples import TokenisedSplit
from tsqlora.errors import SettingsError
from tsqlora.run.config import Config
from tsqlora.run.plan import passes, plan, scoring_plan, without_effect
from tsqlora.training.arguments import training_arguments


def split(rows: int) -> TokenisedSplit:
    return TokenisedSplit(samples(rows, 2), ("hash",) * rows, 0)


def settings(**sections: Mapping[str, Any]) -> Config:
    required = {"model": {"path": "a/model"}, "data": {"train": "rows.jsonl"}}
    training = {"epochs": 6, "batch_size": 8} | dict(sections.pop("training", {}))
    return Config.model_validate({**required, "ranks": {"interval": 4}, "training": training, **sections})


def planned(config: Config, model: PeftModel, *, rows: int = 100) -> dict[str, Any]:
    args = training_arguments(
        Path("nowhere"),
        epochs=config.training.epochs,
        learning_rate=config.training.learning_rate,
        batch_size=config.training.batch_size,
        eval_batch_size=config.training.eval_batch_size,
        bf16=False,
        seed=0,
        further=config.training.further_arguments(),
    )
    return plan(config, model, {"train": split(rows), "validation": split(10)}, args)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return tsq.wrap(tiny_bert(num_labels=2, dtype=torch.float32), mean_rank=8)


@pytest.mark.parametrize(("rows", "batch_size", "accumulation"), [(100, 8, 1), (100, 7, 3), (9, 8, 4), (101, 50, 2)])
def test_steps_are_those_of_the_drawn_rows(rows: int, batch_size: int, accumulation: int, model: PeftModel) -> None:
    further = {"epochs": 12, "batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    config = settings(training=further, ranks={"policy": "fixed"})
    told = planned(config, model, rows=rows)
    half = math.ceil(rows / 2)
    drawn = [range(half)[start : start + batch_size] for start in range(0, half, batch_size)]
    assert told["rows_an_epoch"] == sum(map(len, drawn))
    assert told["steps"] == 12 * math.ceil(len(drawn) / accumulation)


def test_rows_budget_and_parameters_are_the_models(model: PeftModel) -> None:
    told = planned(settings(), model)
    assert told["rows"] == {"train": 100, "validation": 10}
    assert set(told["ranks"].values()) == {8}
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert told["budget"] == adapters // 2, "half of the slots are active"
    assert (
        told["trainable"]
        == told["budget"] + sum(p.numel() for p in model.base_model.model.classifier.parameters()) // 2
    )
    assert told["memory_bytes"] > 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("quality", "warmup", "scoring"),
    [
        ({}, 100, (100 + 100, 0)),
        ({"reference": 40}, 100, (100 + 40, 0)),
        ({"weights": {"loss": -1.0}}, 100, (100 + 100, 0)),
        ({"weights": {"convergence": 1.0}}, 100, (100 + 2 * 100, 100 + 100)),
        ({"preset": "paper", "reference": 40}, 100, (2 * 100 + 2 * 40, 100 + 40)),
        ({"warmup": 1.2}, 150, (100 + 100, 0)),
        ({"warmup": 0.1}, 50, (100 + 100, 0)),
    ],
)
def test_passes_are_counted_by_phase(quality: dict[str, Any], warmup: int, scoring: tuple[int, int]) -> None:
    told = passes(settings(quality=quality, ranks={"samples": 20}), rows=100, size=50)
    assert told["warm-up"] == {"forward": warmup, "backward": warmup}
    assert told["scoring"] == {"forward": scoring[0], "backward": scoring[1]}
    assert told["ranks"] == {"forward": 20, "backward": 20}
    assert told["training"] == {"forward": 300 - warmup, "backward": 300 - warmup}


@pytest.mark.parametrize(
    ("sections", "passed"),
    [
        ({}, (2 * 100 + 2 * 40, 100 + 40)),
        ({"task": {"type": "causal-lm"}}, (2 * 100 + 3 * 40, 100 + 40)),
        ({"task": {"type": "causal-lm"}, "quality": {"weights": {"ifd": 1.0}}}, (3 * 100 + 3 * 40, 100 + 40)),
    ],
)
def test_scores_alone_count_every_term_and_the_test_of_text(
    sections: dict[str, Any], passed: tuple[int, int], model: PeftModel
) -> None:
    config = settings(**sections | {"quality": {"reference": 40} | sections.get("quality", {})})
    told = scoring_plan(config, model, rows=100, max_length=8, warmup=True)
    assert told["passes"]["scoring"] == {"forward": passed[0], "backward": passed[1]}


def test_the_control_only_trains() -> None:
    told = passes(settings(quality={"enabled": False}), rows=100, size=50)
    assert told == {"training": {"forward": 300, "backward": 300}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"quality": {"warmup": 3.0}},
            "a warm-up of 3 passes is 6 epochs of 50 rows, and the run has 6: no scored epoch would be left; "
            "lower quality.warmup or raise training.epochs",
        ),
        (
            {"ranks": {"interval": 30}},
            "no adjustment fits into 42 steps with ranks.interval 30, ranks.warmup 0.1 and ranks.freeze 0.3; "
            "lower them, train longer, or use ranks.policy fixed",
        ),
        ({"ranks": {"mean": 0.5, "interval": 4}}, "ranks.min"),
    ],
)
def test_what_cannot_be_done_is_refused(sections: dict[str, Any], message: str, model: PeftModel) -> None:
    with pytest.raises(SettingsError) as caught:
        planned(settings(**sections), model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, []),
        ({"ranks": {"policy": "fixed"}}, []),
        (
            {"ranks": {"policy": "fixed", "interval": 4, "moves": 2, "gamma": 0.5}},
            ["ranks.interval, ranks.moves without effect: ranks.policy is fixed"],
        ),
        (
            {"ranks": {"policy": "fixed", "gamma": 0.5}, "quality": {"enabled": False}},
            ["ranks.gamma without effect: ranks.policy is fixed"],
        ),
        (
            {"ranks": {"samples": 8}, "quality": {"enabled": False, "fraction": 0.2, "preset": "paper"}},
            [
                "quality.preset without effect: quality.enabled is false",
                "ranks.samples without effect: nothing is scored",
            ],
        ),
        (
            {"ranks": {}, "quality": {"guard": False, "scope": "full"}},
            ["quality.scope, quality.guard without effect: no term of Q that has a weight is of gradients"],
        ),
        ({"ranks": {}, "quality": {"guard": False, "scope": "full", "preset": "paper"}}, []),
        ({"ranks": {}, "training": {"disable_tqdm": True}}, []),
        (
            {"ranks": {}, "training": {"disable_tqdm": False}},
            ["training.disable_tqdm without effect: tsqlora shows progress itself, on stderr"],
        ),
    ],
)
def test_settings_without_effect_are_told(sections: dict[str, Any], told: list[str], model: PeftModel) -> None:
    config = settings(**sections)
    assert without_effect(config) == told
    assert planned(config, model)["without_effect"] == told
