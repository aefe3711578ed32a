"""Which cells count, which run again, and that a block's cells share their settings."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tsqlora.errors import SettingsError

sys.path.append(str(Path(__file__).parents[2] / "bench"))
glue: Any = importlib.import_module("glue")

BLOCK, NOW = glue.Block("sst2", 2000, 0.2, 4), "c0ffee0" + 33 * "0"
RATES = {"lora+all": 1e-3, "tsqlora+quality": 1e-3}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(glue, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def a_cell(entry: str = "lora+all", *, seed: int = 0, rate: float = 1e-3, commit: str | None = NOW, **more: Any) -> Any:
    method, policy = entry.split("+")
    about = {"method": method, "policy": policy, "seed": seed, "learning_rate": rate}
    metrics = {"validation": {"accuracy": 0.8, "loss": 0.5}, "test": {"accuracy": 0.8}}
    return {"cell": about, "commit": commit, "metrics": metrics, "data_hash": "of the rows"} | more


def finished(folder: Path, *cells: Any, recheck: bool | None = False, epochs: int = 8) -> Path:
    """Cells as `tsqlora compare` leaves them; without `quality.recheck`, those of code that didn't have it yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(cells):
        about = cell["cell"]
        settings = {
            "model": {"path": f"/somewhere/{number}/minilm/model"},
            "data": {"train": f"/somewhere/{number}/train.jsonl"},
            "quality": {} if recheck is None else {"recheck": recheck},
            "training": {"epochs": epochs, "seed": about["seed"], "learning_rate": about["learning_rate"]},
        }
        name = f"{about['method']}+{about['policy']}_seed{about['seed']}_lr{about['learning_rate']:g}"
        (folder / f"{name}.json").write_text(json.dumps(cell | {"settings": settings}))
    return folder


def retained(results: Path) -> Any:
    return json.loads((results / f"{BLOCK.name}.json").read_text())


@pytest.mark.parametrize(
    ("commit", "all_rows", "quality"),
    [
        ("5de8a2e", True, True),
        ("389524f", True, True),
        ("2ba0495", False, True),
        ("e3ab70f", False, True),
        ("02d971b", False, False),
        (None, False, False),
    ],
)
def test_a_cell_is_stale_where_its_code_made_other_numbers(commit: str | None, all_rows: bool, quality: bool) -> None:
    long = None if commit is None else commit + 33 * "0"
    assert glue.stale(a_cell("lora+all", commit=long)) is all_rows
    assert glue.stale(a_cell("lora+random", commit=long)) is all_rows
    assert glue.stale(a_cell("tsqlora+quality", commit=long)) is quality


@pytest.mark.parametrize(
    ("noise", "equal", "stale"),
    [
        ({"evident": True}, "steps", True),
        ({"evident": True}, "epochs", False),
        ({"evident": True, "offsets": [0.1, -0.1]}, "steps", False),
        ({"evident": False}, "steps", False),
        (None, "steps", False),
    ],
)
def test_a_cell_that_left_rows_out_without_fitting_offsets_is_stale(noise: Any, equal: str, stale: bool) -> None:
    assert glue.stale(a_cell("tsqlora+quality", quality={"noise": noise}, equal=equal)) is stale


def test_a_stale_cell_is_as_good_as_not_run(tmp_path: Path) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell(commit="389524f"), a_cell(seed=1, commit="2ba0495")))
    assert not glue.finished(BLOCK, 0, "lora", RATES)
    assert glue.finished(BLOCK, 1, "lora", RATES)
    assert not glue.finished(BLOCK, 2, "lora", RATES)


def test_cells_of_a_block_that_is_not_shown_yet_are_known_and_come_with_the_others(
    tmp_path: Path, results: Path
) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell()))
    (results / "unfinished").mkdir()
    (results / f"{BLOCK.name}.json").rename(results / "unfinished" / f"{BLOCK.name}.json")
    assert glue.finished(BLOCK, 0, "lora", RATES)
    glue.keep(BLOCK, finished(tmp_path / "b", a_cell(seed=1)))
    assert {cell["cell"]["seed"] for cell in retained(results)["cells"].values()} == {0, 1}


def test_a_stale_cell_is_run_anew_and_replaced(tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file in the cache must not answer for it."""
    monkeypatch.setattr(glue, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(glue, "config_of", lambda *args: None)
    folder = tmp_path / "cache" / BLOCK.name / "seed0"
    cells = finished(folder / "cells" / "cells", a_cell(commit="389524f"))
    (folder / "settings.yaml").write_text("{}")
    glue.keep(BLOCK, cells)

    def compare(*args: Any, out: Path, **how: Any) -> None:
        assert not list((out / "cells").glob("*.json"))
        finished(out / "cells", a_cell())

    monkeypatch.setattr(glue, "compare", compare)
    glue.run(BLOCK, 0, ["lora"], tmp_path, rates=RATES)
    assert [cell["commit"] for cell in retained(results)["cells"].values()] == [NOW]


def test_a_best_rate_that_is_the_last_of_those_tried_is_told(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = {"lora": (5e-4, 1e-3, 2e-3), "eva": (1e-3, 2e-3)}
    cells = [a_cell(f"{name}+all", rate=rate) for name, rates in tried.items() for rate in rates]
    for cell in cells:
        rate = cell["cell"]["learning_rate"]
        cell["metrics"]["validation"] = {"accuracy": 0.9 - abs(rate - 1e-3), "loss": 0.5}
    results.mkdir()
    (results / f"{glue.SWEPT.name}.json").write_text(json.dumps({"cells": dict(enumerate(cells))}))
    monkeypatch.setattr(glue, "run", lambda *_, **__: None)
    glue.sweep(["lora", "eva"], [1e-3], [0], tmp_path)
    output = capsys.readouterr().out.splitlines()
    assert set(output) == {"eva+all: 0.001 is the best of those tried, and the last on its side; try further"}


def test_what_is_kept_names_no_path_no_seed_and_no_rate(tmp_path: Path, results: Path) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell(), a_cell(seed=1)))
    assert retained(results)["settings"]["training"] == {"epochs": 8}
    assert retained(results)["settings"]["model"]["path"] == "minilm"
    assert retained(results)["settings"]["data"]["train"] is None
    assert len(retained(results)["cells"]) == 2


def test_cells_of_other_settings_are_refused_by_the_settings_names(tmp_path: Path, results: Path) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell()))
    before = retained(results)
    new = finished(tmp_path / "b", a_cell(seed=1), recheck=True, epochs=6)
    with pytest.raises(SettingsError, match="sst2_2000_wrong20_rank4") as refused:
        glue.keep(BLOCK, new)
    assert "quality.recheck False, now True" in str(refused.value)
    assert "training.epochs 8, now 6" in str(refused.value)
    assert retained(results) == before


@pytest.mark.parametrize("order", [(None, False), (False, None)])
def test_a_setting_that_came_since_is_the_same_at_its_default(
    tmp_path: Path, results: Path, order: tuple[bool | None, bool | None]
) -> None:
    for seed, recheck in enumerate(order):
        glue.keep(BLOCK, finished(tmp_path / str(seed), a_cell(seed=seed), recheck=recheck))
    assert len(retained(results)["cells"]) == 2


def test_stale_cells_of_other_settings_make_way(tmp_path: Path, results: Path) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell(commit="389524f"), a_cell(seed=1, commit="5de8a2e"), epochs=6))
    glue.keep(BLOCK, finished(tmp_path / "b", a_cell()))
    assert retained(results)["settings"]["training"]["epochs"] == 8
    assert [cell["commit"] for cell in retained(results)["cells"].values()] == [NOW]


def test_a_rate_at_which_a_seed_failed_is_not_chosen_over_one_at_which_none_did() -> None:
    better = a_cell(rate=1e-2, metrics={"validation": {"accuracy": 0.9, "loss": 0.4}})
    failed = a_cell(rate=1e-2, seed=1, metrics={}, failed="diverged")
    assert glue.best_rate([better, failed, a_cell(), a_cell(seed=1)]) == 1e-3
    with pytest.raises(SettingsError, match=r"lora\+all"):
        glue.best_rate([failed])


@pytest.mark.parametrize("path", sorted(glue.RESULTS.glob("**/*_rank*.json")), ids=lambda path: path.stem)
def test_every_stored_cell_has_the_hash_of_what_decides_it(path: Path) -> None:
    stored = json.loads(path.read_text())
    hashes = [cell["settings_hash"] for cell in stored["cells"].values()]
    assert hashes == [glue.hash_of(stored["block"], stored["settings"], c) for c in stored["cells"].values()]
    assert len({*hashes}) == len(hashes)


@pytest.mark.parametrize("name", ["method", "policy", "seed", "learning_rate"])
def test_a_hash_says_what_its_cell_is(results: Path, tmp_path: Path, name: str) -> None:
    glue.keep(BLOCK, finished(tmp_path / "a", a_cell(settings_hash="of compare")))
    result = retained(results)
    [cell] = result["cells"].values()
    assert cell["settings_hash"] == glue.hash_of(result["block"], result["settings"], cell) != "of compare"
    cell["cell"][name] = "another"
    assert cell["settings_hash"] != glue.hash_of(result["block"], result["settings"], cell)


def test_a_block_chooses_its_rates_along_the_ladder_until_the_best_is_not_the_last(
    results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the block's metric, on another seed; the results keep the choice when cells are added."""
    block, sweeps = glue.Block("cola", 500, 0.0, 2), list[list[float]]()

    def run(block: Any, seed: int, methods: Any, shared: Path, *, sweep: list[float]) -> None:
        sweeps.append(list(sweep))
        cells = [a_cell(seed=seed, rate=rate) for rate in sweep]
        for cell in cells:
            rate = cell["cell"]["learning_rate"]
            cell["metrics"]["validation"] = {"accuracy": -rate, "matthews": -abs(rate - 1e-2), "loss": 0.5}
        glue.keep(block, finished(tmp_path / str(len(sweeps)), *cells))

    monkeypatch.setattr(glue, "run", run)
    glue.choose(block, ["lora"], tmp_path)
    assert sweeps == [[1e-3, 2e-3, 5e-3], [1e-3, 2e-3, 5e-3, 1e-2], [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]]
    assert glue.rates_of(glue.stored(block)) == {"lora+all": 1e-2}
    glue.keep(block, finished(tmp_path / "later", a_cell(rate=1e-2)))
    assert glue.rates_of(glue.stored(block)) == {"lora+all": 1e-2}
    assert {cell["cell"]["seed"] for cell in glue.stored(block)["cells"].values()} == {0, glue.CHOOSING}
