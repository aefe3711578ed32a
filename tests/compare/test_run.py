"""One cell: every method and policy on a tiny model, at the same steps, with its own process and peak of memory."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.methods import METHODS, POLICIES, entries
from tsqlora.compare.origin import PACKAGE, commit_of
from tsqlora.compare.run import planned_steps, run_cell, settings_hash
from tsqlora.compare.worker import in_own_process
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.run.config import Config, load_config
from tsqlora.run.job import load
from tsqlora.run.train import dry_run

ROWS, RIVALS = 160, ("loss", "el2n", "gradnorm")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_checkpoint(folder / "model")
    write_jsonl(folder / "train.jsonl", make_rows(ROWS))
    write_jsonl(folder / "validation.jsonl", make_rows(20, seed=3))
    write_jsonl(folder / "test.jsonl", make_rows(40, seed=5))
    return folder


def settings(place: Path, **sections: Any) -> Config:
    others = [f"data.{split}={place / split}.jsonl" for split in ("validation", "test")]
    return load_config(write_config(place / "c.yaml", place / "model", place / "train.jsonl", **sections), others)


def cell_of(name: str, seed: int = 0) -> Cell:
    return Cell(entries([name])[0], seed, 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_at_the_same_steps_and_tells_its_cost(method: str, place: Path) -> None:
    found = run_cell(settings(place), cell_of(method), equal="steps")
    assert "failed" not in found
    assert found["steps"] == 60
    assert found["cost"]["training"]["forward"] == 60 * 8
    assert ("look" in found["cost"]) == (METHODS[method].policy == "quality")
    assert found["metrics"].keys() == {"validation", "test"}
    assert found["parameters"]["trainable"] > 0
    assert (found["cost"]["building"]["forward"] > 0) == (method == "eva")
    assert found["seconds"] == pytest.approx(sum(c["seconds"] for p, c in found["cost"].items() if p != "evaluation"))
    assert found["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws_its_share_of_the_rows(policy: str, place: Path) -> None:
    """Our guard turns back no rival's softmax of one term."""
    found = run_cell(settings(place), cell_of(f"lora+{policy}"), equal="steps")
    assert found["steps"] == 60
    assert found["quality"]["rows_an_epoch"] == (ROWS if policy in ("all", "head") else ROWS // 2)
    looks = found["quality"].get("looks")
    assert (looks is None) == (policy in ("all", "random"))
    assert looks is None or looks[0]["head_start"]["replaced"]
    assert bool(looks) and "kept" in looks[0] if policy in ("quality", *RIVALS) else True
    if policy in RIVALS:
        assert looks[0]["not_ready"] is None
        assert not any("drawn at random" in note for note in found["notes"])


def test_a_cell_tells_why_its_policy_drew_at_random(place: Path) -> None:
    even = run_cell(settings(place), cell_of("lora+quality"), equal="steps")
    assert even["quality"]["random"] == "no row was left out, and rows are drawn evenly"
    kept_random = settings(place, quality={"fraction": 0.5, "head_start": False, "look_again": False})
    at_chance = run_cell(kept_random, cell_of("lora+gradnorm"), equal="steps")
    assert "a constant guess" in at_chance["quality"]["random"]


def test_a_commit_is_that_of_the_package_and_says_where_it_was_changed(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    def asked() -> str | None:
        return commit_of(package)

    package = tmp_path / "src" / "tsqlora"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one")
    assert asked() is None  # no checkout
    git("init")
    (tmp_path / "readme").write_text("somebody's own project around an installed package")
    git("add", "readme")
    git("commit", "-m", "one")
    assert asked() is None
    git("add", ".")
    git("commit", "-m", "two")
    clean = asked()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "readme").write_text("what is not code")
    assert asked() == clean
    (package / "__init__.py").write_text("two")
    assert asked() == f"{clean}-dirty"
    assert (PACKAGE / "__init__.py").exists()  # the file by which a checkout is told


def test_the_commit_is_asked_for_before_the_first_cell_and_then_stays() -> None:
    """Cells of hours begin in processes that come from one, whose code was imported before the first of them."""
    asked = (
        "import tsqlora.compare.preload; from tsqlora.compare.origin import commit; print(commit.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_a_cell_has_the_same_result_again_and_its_seed_decides_it(place: Path) -> None:
    once, again, other = (run_cell(settings(place), cell_of("lora+random", s), equal="steps") for s in (0, 0, 1))
    assert once["metrics"] == again["metrics"]
    assert once["settings_hash"] == again["settings_hash"]
    assert other["metrics"] != once["metrics"]
    assert other["settings_hash"] != once["settings_hash"]


def test_a_cells_hash_is_of_what_decides_it_and_not_of_where_files_lie(place: Path, tmp_path: Path) -> None:
    def hash_of(config: Config, name: str = "lora", *, data: str = "rows", equal: Any = "steps") -> str:
        return settings_hash(config, cell_of(name), equal=equal, data=data)

    config, moved = settings(place), copytree(place, tmp_path / "moved")
    elsewhere = load_config(
        place / "c.yaml", [f"data.{s}={moved / s}.jsonl" for s in ("train", "validation", "test", "trusted")]
    )
    assert hash_of(elsewhere) == hash_of(config)
    others = [hash_of(config, name) for name in ("dora", "lora+random")]
    others += [hash_of(config, data="others"), hash_of(config, equal="epochs")]
    others += [hash_of(settings(place, ranks={"mean": 4.0})), hash_of(config)]
    assert len(set(others)) == len(others)


def test_with_equal_epochs_who_has_all_rows_takes_more_steps(place: Path) -> None:
    job = load(settings(place))
    assert planned_steps(job, cell_of("lora"), equal="epochs") == 120
    assert planned_steps(job, cell_of("lora+random"), equal="epochs") == 60
    accumulated = settings(place, training={"epochs": 6, "batch_size": 8, "gradient_accumulation_steps": 2})
    assert planned_steps(replace(job, config=accumulated), cell_of("lora"), equal="steps") == 30


def test_steps_that_are_set_are_those_of_every_cell(place: Path) -> None:
    config = settings(place, training={"max_steps": 7, "epochs": 6, "batch_size": 8})
    job = load(config)
    for name, equal in (("lora", "epochs"), ("lora+random", "steps")):
        assert planned_steps(job, cell_of(name), equal=equal) == 7
    found = run_cell(config, cell_of("lora"), equal="epochs")
    assert (found["steps"], found["cost"]["training"]["forward"]) == (7, 7 * 8)
    half = settings(place, training={"epochs": 0.5, "batch_size": 8})
    assert planned_steps(replace(job, config=half), cell_of("lora"), equal="steps") == 5


def test_a_training_that_diverges_is_a_result(place: Path) -> None:
    found = run_cell(settings(place), Cell(Entry("full", "all"), 0, 1e20), equal="steps")
    assert "not finite" in found["failed"]


def test_a_term_that_the_task_has_not_is_refused_before_the_look(place: Path) -> None:
    asked = settings(place, quality={"fraction": 0.5, "weights": {"ifd": 1.0}})
    told: list[str] = []
    with pytest.raises(UnsupportedError, match="'ifd' compares a target with and without its prompt"):
        run_cell(asked, cell_of("tsqlora"), equal="steps", progress=lambda phase, *_: told.append(phase))
    assert not told


def test_a_draw_too_small_for_its_classes_is_refused_before_the_look(place: Path) -> None:
    asked = settings(place, quality={"fraction": 0.005, "preset": "paper"})
    told: list[str] = []
    with pytest.raises(SettingsError, match="1 rows cannot hold one of each of 2 labels; raise fraction"):
        run_cell(asked, cell_of("tsqlora"), equal="steps", progress=lambda phase, *_: told.append(phase))
    assert not told


def test_what_no_softmax_draws_may_be_as_few_as_it_likes(place: Path) -> None:
    control = {"enabled": False, "fraction": 0.005, "preset": "paper"}
    assert dry_run(settings(place, quality=control, ranks={"policy": "fixed"}))["rows"]["train"] == ROWS


def test_a_process_of_its_own_gives_the_same_and_hands_errors_on(place: Path) -> None:
    told: list[str] = []
    work = partial(run_cell, settings(place), cell_of("lora"), equal="steps")
    found = in_own_process("lora", work, lambda phase, *_: told.append(phase))
    here = run_cell(settings(place), cell_of("lora"), equal="steps")
    assert found["metrics"] == here["metrics"]
    assert {"training", "validation", "test"} <= set(told)
    wrong = settings(place, quality={"fraction": 0.005, "preset": "paper"})
    with pytest.raises(SettingsError, match="1 rows cannot hold"):
        in_own_process("wrong", partial(run_cell, wrong, cell_of("tsqlora"), equal="steps"))


def test_a_process_that_dies_is_told(place: Path) -> None:
    def die(phase: str, done: int, total: int, *_: object) -> None:
        # The server's child; the server itself, and what tracks its resources, are ours.
        servers = psutil.Process().children()
        for process in psutil.Process().children(recursive=True):
            if process not in servers:
                process.kill()

    with pytest.raises(TsqLoraError, match="its process ended with code"):
        in_own_process("lora", partial(run_cell, settings(place), cell_of("lora"), equal="steps"), die)


def test_a_comparison_that_is_killed_takes_its_training_along_and_goes_on(place: Path, tmp_path: Path) -> None:
    settings(place)
    command = [sys.executable, "-m", "tsqlora.cli", "compare", str(place / "c.yaml")]
    command += ["--methods", "lora,lora+random,tsqlora", "--seeds", "0,1", "--out", str(tmp_path / "out"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    cells = tmp_path / "out" / "cells"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as running:
        _wait_for(lambda: len(list(cells.glob("*.json"))) >= 2)
        family = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    gone, left = psutil.wait_procs(family, timeout=20)
    assert len(gone) >= 2
    assert not left
    first = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(list(cells.glob("*.json"))) == 6
    assert {name: (cells / name).read_bytes() for name in first} == first
    assert done.stderr.count("(known)") == len(first)


def _wait_for(true: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_control_with_the_head_start_looks_once_and_scores_nothing(place: Path) -> None:
    for policy in ("head", "even"):
        found = run_cell(settings(place), cell_of(f"lora+{policy}"), equal="steps")
        (only,) = found["quality"]["looks"]
        assert only["head_start"]["replaced"]
        assert "kept" not in only
        assert found["cost"]["look"]["backward"] == 0
