"""A block's cells share their settings, and its learning rates are chosen by another seed."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tsqlora.errors import SettingsError
from tsqlora.settings import Config

sys.path.append(str(Path(__file__).parents[2] / "bench"))
glue: Any = importlib.import_module("glue")
harness: Any = importlib.import_module("harness")

BLOCK, NOW = glue.Block("sst2", 2000, 0.2, 4), "c0ffee0" + 33 * "0"


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(glue, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def a_cell(entry: str = "lora+all", *, seed: int = 0, rate: float = 1e-3, commit: str | None = NOW, **more: Any) -> Any:
    method, policy = entry.split("+")
    about = {"method": method, "policy": policy, "seed": seed, "learning_rate": rate}
    metrics = {"validation": {"accuracy": 0.8, "loss": 0.5}, "test": {"accuracy": 0.8}}
    return {"cell": about, "commit": commit, "metrics": metrics, "data_hash": "of the rows"} | more


def config(*, seed: int = 0, epochs: int = 8) -> Config:
    training = {"epochs": epochs, "learning_rate": 1e-3, "seed": seed}
    return Config.model_validate({"model": {"path": "a/minilm/model"}, "data": {"train": "b"}, "training": training})


def retained(results: Path) -> Any:
    return json.loads((results / f"{BLOCK.name}.json").read_text())


def test_what_is_kept_names_no_path_no_seed_and_no_rate(results: Path) -> None:
    glue.keep(BLOCK, config(), "one", a_cell())
    glue.keep(BLOCK, config(seed=1), "other", a_cell(seed=1))
    settings = retained(results)["settings"]["training"]
    assert settings["epochs"] == 8
    assert not {"seed", "learning_rate"} & settings.keys()
    assert retained(results)["settings"]["model"]["path"] == "minilm"
    assert retained(results)["settings"]["data"]["train"] is None
    assert retained(results)["cells"].keys() == {"one", "other"}


def test_cells_of_other_settings_are_refused(results: Path) -> None:
    glue.keep(BLOCK, config(), "one", a_cell())
    before = retained(results)
    with pytest.raises(SettingsError, match="sst2_2000_wrong20_rank4"):
        glue.keep(BLOCK, config(epochs=6), "other", a_cell(seed=1))
    assert retained(results) == before


def test_a_rate_at_which_training_failed_is_not_chosen() -> None:
    failed = a_cell(rate=1e-2, metrics={}, failed="diverged")
    assert glue.best_rate([failed, a_cell()]) == 1e-3
    with pytest.raises(SettingsError, match=r"lora\+all"):
        glue.best_rate([failed])


def test_a_block_chooses_its_rates_along_the_ladder_until_the_best_is_not_the_last(
    results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the block's metric, on another seed; the results keep the choice when cells are added."""
    block, ran = glue.Block("cola", 500, 0.0, 2), list[float]()
    monkeypatch.setattr(glue, "write_data", lambda *_: None)
    monkeypatch.setattr(glue, "config_of", lambda *_: config())

    def trained(config: Config, entry: Any) -> Any:
        rate = config.training.learning_rate
        ran.append(rate)
        values = {"accuracy": -rate, "matthews": -abs(rate - 1e-2), "loss": 0.5}
        metrics = {"validation": values, "test": values}
        return a_cell(seed=config.training.seed, rate=rate, metrics=metrics, seconds=1.0)

    monkeypatch.setattr(glue, "cell", trained)
    assert glue.choose(block, harness.entry("lora"), tmp_path) == 1e-2
    assert ran == [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
    glue.run(block, 0, harness.entry("lora"), 1e-2, tmp_path)
    glue.run(block, 0, harness.entry("lora"), 1e-2, tmp_path)
    assert glue.choose(block, harness.entry("lora"), tmp_path) == 1e-2
    assert len(ran) == 6
    assert {cell["cell"]["seed"] for cell in glue.stored(block)["cells"].values()} == {0, glue.CHOOSING}
