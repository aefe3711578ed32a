"""A block's cells share their settings, and its learning rates are chosen by another seed."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tsqlora.errors import SettingsError
from tsqlora.training.record import RunRecord

sys.path.append(str(Path(__file__).parents[2] / "bench"))
glue: Any = importlib.import_module("glue")

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


def finished(folder: Path, *cells: Any, epochs: int = 8) -> Path:
    """A comparison as `tsqlora compare` leaves it."""
    folder.mkdir(parents=True)
    training = {"epochs": epochs, "learning_rate": 1e-3}
    model, data = {"path": f"{folder}/minilm/model"}, {"train": f"{folder}/train.jsonl"}
    (folder / "config.yaml").write_text(json.dumps({"model": model, "data": data, "training": training}))
    for number, cell in enumerate(cells):
        about = {"bf16": True, "commit": NOW, "peak_memory_bytes": 1, "random": None, **cell["cell"]}
        seed, metrics = about.pop("seed"), cell["metrics"]
        run = RunRecord("finished", seed, "sequence-classification", None, {"hash": "of the rows"}, {}, metrics=metrics)
        run.compared = about
        (folder / str(number)).mkdir()
        run.save(folder / str(number))
    return folder


def retained(results: Path) -> Any:
    return json.loads((results / f"{BLOCK.name}.json").read_text())


def test_what_is_kept_names_no_path_no_seed_and_no_rate(tmp_path: Path, results: Path) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell(), a_cell(seed=1)))
    settings = retained(results)["settings"]["training"]
    assert settings["epochs"] == 8
    assert not {"seed", "learning_rate"} & settings.keys()
    assert retained(results)["settings"]["model"]["path"] == "minilm"
    assert retained(results)["settings"]["data"]["train"] is None
    assert len(retained(results)["cells"]) == 2


def test_cells_of_other_settings_are_refused(tmp_path: Path, results: Path) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell()))
    before = retained(results)
    new = finished(tmp_path / "b", a_cell(seed=1), epochs=6)
    with pytest.raises(SettingsError, match="sst2_2000_wrong20_rank4"):
        glue.keep(BLOCK, new)
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
    block, sweeps = glue.Block("cola", 500, 0.0, 2), list[list[float]]()

    def run(block: Any, seed: int, method: str, shared: Path, *, sweep: list[float]) -> None:
        sweeps.append(list(sweep))
        cells = [a_cell(seed=seed, rate=rate) for rate in sweep]
        for cell in cells:
            rate = cell["cell"]["learning_rate"]
            cell["metrics"]["validation"] = {"accuracy": -rate, "matthews": -abs(rate - 1e-2), "loss": 0.5}
        glue.keep(block, finished(tmp_path / str(len(sweeps)), *cells))

    monkeypatch.setattr(glue, "run", run)
    assert glue.choose(block, "lora", tmp_path) == 1e-2
    assert sweeps == [[1e-3, 2e-3, 5e-3], [1e-3, 2e-3, 5e-3, 1e-2], [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]]
    glue.keep(block, finished(tmp_path / "later", a_cell(rate=1e-2)))
    assert glue.choose(block, "lora", tmp_path) == 1e-2
    assert len(sweeps) == 3
    assert {cell["cell"]["seed"] for cell in glue.stored(block)["cells"].values()} == {0, glue.CHOOSING}
