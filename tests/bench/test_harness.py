"""Every method trains at the same steps, on the rows that were chosen for it, and its result is ready for JSON."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import TrainerCallback

from runs import make_rows, set_up, write_jsonl
from tsqlora.errors import SettingsError
from tsqlora.settings import Config, load_config

sys.path.append(str(Path(__file__).parents[2] / "bench"))
harness: Any = importlib.import_module("harness")

ROWS = 160


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    training = {"epochs": 6, "batch_size": 8, "learning_rate": 0.02}
    folder = set_up(tmp_path_factory.mktemp("harness"), rows=ROWS, training=training, ranks={"policy": "tsqlora"})
    splits = [
        f"data.{split}={write_jsonl(folder / f'{split}.jsonl', make_rows(40))}" for split in ("validation", "test")
    ]
    return load_config(folder / "c.yaml", [*splits, "ranks.mean=4"])


@pytest.mark.parametrize("method", harness.METHODS)
def test_every_method_trains_at_the_same_steps_and_counts_its_cost(method: str, config: Config) -> None:
    result = harness.train(config, harness.entry(method))
    assert (result["steps"], result.get("failed")) == (60, None)
    assert result["cost"]["training"]["forward"] == 60 * 8
    assert ("look" in result["cost"]) == (method == "tsqlora")
    assert result["metrics"].keys() == {"validation", "test"}
    assert sum(result["ranks"].values()) == pytest.approx(4 * len(result["ranks"]), abs=len(result["ranks"]) / 2)
    assert json.loads(json.dumps(result))["metrics"] == result["metrics"]


@pytest.mark.parametrize("policy", harness.ROWS)
def test_every_choice_draws_its_share_of_the_rows(policy: str, config: Config) -> None:
    quality = harness.train(config, harness.entry(f"lora+{policy}"))["quality"]
    assert quality["rows_an_epoch"] == (ROWS if policy in ("all", "head") else ROWS // 2)
    looks = quality["looks"]
    assert (looks == []) == (policy in ("all", "random"))
    assert looks == [] or ("kept" in looks[0]) == (policy == "quality")
    assert (quality["random"] is not None) == (policy == "quality")  # made rows have no wrong label


class Weights(TrainerCallback):
    """The penalty of each forward pass, in training and in evaluation."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, float]] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.register_forward_pre_hook(
            lambda *_: self.seen.add((model.training, model.peft_config["default"].orth_reg_weight))
        )


@pytest.mark.parametrize(("method", "weight"), [("adalora", 0.5), ("elalora", 0.1)])
def test_the_penalty_is_in_training_only(method: str, weight: float, config: Config) -> None:
    weights = Weights()
    harness.train(config, harness.entry(method), also=lambda job, steps: [weights])
    assert weights.seen == {(True, weight), (False, 0.0)}


def test_the_allocator_gets_the_phases_of_our_own_callback(config: Config) -> None:
    job = harness.load(config)
    built = harness.adalora(job, 500)
    of = built.model.peft_config["default"]
    assert (of.init_r, of.target_r, of.total_step) == (6, 4, 500)
    assert (of.tinit, of.tfinal, of.deltaT) == (50, 150, 25)
    assert of.lora_alpha / of.init_r == job.config.adapter.alpha / 4


def test_a_training_that_diverges_is_a_result(config: Config) -> None:
    rate = harness.changed(config, training={"learning_rate": 1e20})
    assert "no finite gradient" in harness.train(rate, harness.entry("adalora"))["failed"]


def test_the_seed_decides_a_result(config: Config) -> None:
    once, again, other = (
        harness.train(harness.changed(config, training={"seed": seed, "max_steps": 4}), harness.entry("lora+random"))
        for seed in (0, 0, 1)
    )
    assert once["metrics"] == again["metrics"] != other["metrics"]


@pytest.mark.parametrize("name", ["full", "lora+loss"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=name.partition("+")[2] or name):
        harness.entry(name)


def test_what_the_penalty_or_a_rank_cannot_be_is_refused(config: Config) -> None:
    torch.manual_seed(0)
    for changes in (
        {"training": {"label_smoothing_factor": 0.1}},
        {"ranks": {"mean": 2.5}},
        {"training": {"max_steps": 3}},
    ):
        with pytest.raises(SettingsError):
            harness.train(harness.changed(config, **cast(Any, changes)), harness.entry("adalora"))
