"""Every setting reaches what it is for: a key that nothing reads is a promise not kept."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

from tables import table_with
from tsqlora import paper
from tsqlora.errors import SettingsError
from tsqlora.model import named
from tsqlora.model.load import Pretrained
from tsqlora.settings import Config, Section
from tsqlora.training import job, predict
from tsqlora.training import run as fit

REQUIRED = {"model.path": "a/model", "data.train": "rows.jsonl", "ranks.policy": "tsqlora"}

OTHER_VALUES: dict[str, Any] = {
    "model.path": "another/model",
    "model.revision": "v2",
    "model.dtype": "bfloat16",
    "model.quantization": "4bit",
    "model.trust_remote_code": True,
    "task.type": "regression",
    "task.max_new_tokens": 7,
    "task.beams": 3,
    "data.train": "others.jsonl",
    "data.validation": "validation.jsonl",
    "data.test": "test.jsonl",
    "data.trusted": "trusted.jsonl",
    "data.max_bad_rows": 0.2,
    "data.delimiter": "|",
    "data.encoding": "cp1250",
    "data.sheet": "Rows",
    "data.quoting": "literal",
    "data.text": "body",
    "data.text_pair": "second",
    "data.label": "topic",
    "data.format": "alpaca",
    "data.prompt": "question",
    "data.target": "reply",
    "data.messages": "talk",
    "data.max_length": 20,
    "data.validation_fraction": 0.3,
    "quality.enabled": False,
    "quality.fraction": 0.25,
    "quality.preset": "paper",
    "quality.head_start": False,
    "ranks.policy": "fixed",
    "ranks.mean": 4.0,
    "ranks.min": 2,
    "ranks.max": 30,
    "ranks.interval": 7,
    "adapter.alpha": 32.0,
    "adapter.dropout": 0.2,
    "adapter.target_modules": ["query"],
    "adapter.init_from": "another/adapter",
    "training.epochs": 9,
    "training.learning_rate": 1e-5,
    "training.batch_size": 4,
    "training.seed": 5,
    **(
        OF_THE_TRAINER := {
            "training.max_steps": 70,
            "training.weight_decay": 0.1,
            "training.per_device_eval_batch_size": 4,
            "training.bf16": True,
        }
    ),
}


def settings(**overrides: Any) -> Config:
    raw: dict[str, Any] = {}
    for key, value in (REQUIRED | overrides).items():
        *sections, name = key.split(".")
        here = raw
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    return Config.model_validate(raw)


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def what_arrives(config: Config) -> dict[str, Any]:
    """What each boundary of a job is given, with nothing loaded behind it."""
    arrived: dict[str, Any] = {}
    tables = {"train": table_with([{"input_ids": [1], "labels": 0}] * 8)}
    tokenizer = SimpleNamespace(model_max_length=32, pad_token_id=0)
    model: Any = nn.Module()
    model.peft_config, model.config = {}, SimpleNamespace()
    answers = {
        (named, "load_pretrained"): Pretrained(model, tokenizer, ()),
        (job, "prepare"): tables,
        (job, "require_embedded"): None,
        (job, "wrap"): model,
        (paper, "wrap"): model,
        (job, "start_from"): model,
        (named, "read_data"): tables,
        (job, "QualitySubset"): [0] * 4,
        (job, "QualityCallback"): None,
        (job, "ScoringRule"): SimpleNamespace(weights=None, select=True, head_start=True),
        (paper, "RankCallback"): None,
        (predict, "generation_config"): None,
        (predict, "run_pass"): {},
        (fit, "TrainingArguments"): SimpleNamespace(bf16=False, per_device_eval_batch_size=1),
    }

    def boundary(name: str, answer: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            # Objects of ours, which hold all settings, would differ for any reason.
            plain = [a for a in args if a is None or isinstance(a, str | int | float)]
            arrived[name] = (plain, {k: str(v) if k == "rows" else v for k, v in kwargs.items() if k != "about"})
            return answer

        return recorded

    with ExitStack() as stack:
        for (module, name), answer in answers.items():
            stack.enter_context(patch.object(module, name, boundary(name, answer)))
        stack.enter_context(patch.object(job.Job, "collate", "a collator"))
        stack.enter_context(patch.object(job, "has_own_loss", lambda *_: False))
        stack.enter_context(patch.object(fit, "hardware_has_bf16", lambda: False))
        stack.enter_context(patch.object(job, "start_of", lambda config: config.adapter.init_from))
        args = fit.arguments(config, Path("run"))
        loaded = job.load(config)
        arrived["task"] = loaded.task.name
        loaded = loaded.with_adapter()
        method = job.method_of(loaded, Path("scores.parquet"))
        arrived["quality"] = method.quality
        if config.task.type == "causal-lm":
            none: Any = []
            predict.predictor_of(loaded, args).texts(none, phase="")
    return arrived


def test_every_key_has_another_value_here() -> None:
    assert OTHER_VALUES.keys() - OF_THE_TRAINER.keys() == set(keys())


BESIDE: dict[str, dict[str, Any]] = {
    **{f"data.{name}": {"task.type": "causal-lm"} for name in ("format", "prompt", "target", "messages")},
    **{f"task.{name}": {"task.type": "causal-lm"} for name in ("max_new_tokens", "beams")},
}
"""What a setting needs beside it to have a meaning."""


@pytest.mark.parametrize(
    ("task", "key", "cure"),
    [
        ("causal-lm", "data.label", "set data.target, or remove it"),
        ("seq2seq", "data.text_pair", "set data.prompt, or remove it"),
        ("regression", "data.target", "set data.label, or remove it"),
        ("sequence-classification", "data.format", "remove it"),
        ("sequence-classification", "data.messages", "set data.text, or remove it"),
        ("sequence-classification", "task.beams", "remove it"),
    ],
)
def test_a_setting_that_the_task_does_not_read_is_refused(task: str, key: str, cure: str) -> None:
    config = settings(**{"task.type": task, key: OTHER_VALUES[key]})
    with pytest.raises(SettingsError, match=f"^{key} .*{task}.*{cure}$"):
        job.load(config)
    smoothed = settings(**{"task.type": "regression", "training.label_smoothing_factor": 0.1})
    with pytest.raises(SettingsError, match=r"training\.label_smoothing_factor"):
        job.load(smoothed)


@pytest.mark.parametrize("key", sorted(OTHER_VALUES))
def test_every_key_changes_what_some_boundary_is_given(key: str) -> None:
    beside = BESIDE.get(key, {})
    assert what_arrives(settings(**beside | {key: OTHER_VALUES[key]})) != usual(beside.get("task.type"))


@cache
def usual(task: str | None) -> dict[str, Any]:
    """What boundaries are given without that setting."""
    return what_arrives(settings(**({} if task is None else {"task.type": task})))


@pytest.mark.parametrize(
    ("key", "boundary", "argument"),
    [
        ("model.dtype", "load_pretrained", "dtype"),
        ("data.validation_fraction", "read_data", "validation_fraction"),
        ("data.max_length", "prepare", "max_length"),
        ("ranks.min", "RankCallback", "min_rank"),
        ("ranks.max", "wrap", "max_rank"),
        ("ranks.mean", "wrap", "mean_rank"),
        ("adapter.alpha", "wrap", "alpha"),
        ("training.epochs", "TrainingArguments", "num_train_epochs"),
        ("training.max_steps", "TrainingArguments", "max_steps"),
    ],
)
def test_a_setting_arrives_as_it_was_given(key: str, boundary: str, argument: str) -> None:
    value = OTHER_VALUES[key]
    assert what_arrives(settings(**BESIDE.get(key, {}) | {key: value}))[boundary][1][argument] == value


@pytest.mark.parametrize("boundary", ["read_data", "TrainingArguments", "ScoringRule", "RankCallback"])
def test_the_seed_decides_every_random_draw(boundary: str) -> None:
    assert what_arrives(settings(**{"training.seed": 5}))[boundary][1]["seed"] == 5
