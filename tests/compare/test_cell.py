"""One run: every method and policy on a tiny model, at the same steps; and what preflight refuses before the first."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.compare import comparison
from tsqlora.compare.cell import PACKAGE, commit_of, planned_steps, preflight, run_cell, with_seed
from tsqlora.compare.comparison import compare
from tsqlora.compare.methods import METHODS, POLICIES, entries
from tsqlora.data.table import data_hash
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.reports.write import write_report
from tsqlora.run.config import Config, load_config
from tsqlora.run.job import load
from tsqlora.run.train import dry_run
from tsqlora.training.record import RunRecord

ROWS, BY_TERM = 160, ("loss", "el2n", "gradnorm")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_checkpoint(folder / "model")
    write_jsonl(folder / "train.jsonl", make_rows(ROWS))
    write_jsonl(folder / "few.jsonl", make_rows(80))
    write_jsonl(folder / "validation.jsonl", make_rows(20, seed=3))
    write_jsonl(folder / "test.jsonl", make_rows(40, seed=5))
    return folder


def settings(place: Path, **sections: Any) -> Config:
    others = [f"data.{split}={place / split}.jsonl" for split in ("validation", "test")]
    return load_config(write_config(place / "c.yaml", place / "model", place / "train.jsonl", **sections), others)


def few(place: Path, **sections: Any) -> Config:
    """Settings without validation and test rows."""
    return load_config(write_config(place / "few.yaml", place / "model", place / "few.jsonl", **sections))


def trained(config: Config, name: str, out: Path, *, seed: int = 0, rate: float = 0.02) -> RunRecord:
    """A run of an entry, as its run.json has it."""
    run_cell(with_seed(config, seed, rate), entries([name])[0], out / "run", equal="steps")
    return RunRecord.load(out / "run")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_at_the_same_steps_and_counts_its_cost(method: str, place: Path, tmp_path: Path) -> None:
    run = trained(settings(place), method, tmp_path)
    assert (run.status, run.plan["steps"]) == ("finished", 60)
    assert run.cost["training"].forward == 60 * 8
    assert ("look" in run.cost) == (METHODS[method].policy == "quality")
    assert run.metrics.keys() == {"validation", "test"}
    assert run.parameters["trainable"] > 0
    assert run.cost["building"].seconds > 0
    assert run.compared["peak_memory_bytes"] > 2**20
    assert load_config(tmp_path / "run" / "config.yaml").training.max_steps == 60
    assert "<html" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws_its_share_of_the_rows(policy: str, place: Path, tmp_path: Path) -> None:
    """A control looks once and scores nothing; the fallback never overrules the softmax of one term."""
    run = trained(settings(place), f"lora+{policy}", tmp_path)
    assert run.plan["steps"] == 60
    assert run.plan["rows_an_epoch"] == (ROWS if policy in ("all", "head") else ROWS // 2)
    looks = run.quality.get("looks")
    assert (looks is None) == (policy in ("all", "random"))
    if looks is None:
        return
    assert looks[0]["head_start"]["replaced"]
    assert ("kept" in looks[0]) == (policy in ("quality", *BY_TERM))
    if policy in ("head", "even"):
        assert (len(looks), run.cost["look"].backward) == (1, 0)
    if policy in BY_TERM:
        assert looks[0]["not_ready"] is None
        assert run.compared["random"] is None


def test_a_run_says_why_its_policy_drew_at_random(place: Path, tmp_path: Path) -> None:
    assert trained(settings(place), "lora+quality", tmp_path).compared["random"]
    at_chance = settings(place, quality={"fraction": 0.5, "head_start": False, "look_again": False})
    assert "a constant guess" in trained(at_chance, "lora+gradnorm", tmp_path).compared["random"]


def test_a_commit_is_that_of_the_package_and_marks_changes(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    package = tmp_path / "src" / "tsqlora"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one")
    assert commit_of(package) is None  # no checkout
    git("init")
    (tmp_path / "readme").write_text("another project around an installed package")
    git("add", "readme")
    git("commit", "-m", "one")
    assert commit_of(package) is None
    git("add", ".")
    git("commit", "-m", "two")
    clean = commit_of(package)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "readme").write_text("not code")
    assert commit_of(package) == clean
    (package / "__init__.py").write_text("two")
    assert commit_of(package) == f"{clean}-dirty"
    assert (PACKAGE / "__init__.py").exists()


def test_preloading_reads_the_commit_before_the_first_cell() -> None:
    """The processes of all cells come from one that imported the code before the first of them."""
    code = "from tsqlora.compare import cell, preload; print(cell.commit.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_a_run_is_reproducible_and_its_seed_decides_it(place: Path, tmp_path: Path) -> None:
    once, again, other = (trained(settings(place), "lora+random", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert once.metrics == again.metrics
    assert other.metrics != once.metrics


@pytest.mark.parametrize(
    ("training", "name", "equal", "steps"),
    [
        ({"epochs": 6}, "lora", "epochs", 120),
        ({"epochs": 6}, "lora+random", "epochs", 60),
        ({"epochs": 6, "gradient_accumulation_steps": 2}, "lora", "steps", 30),
        ({"epochs": 0.5}, "lora", "steps", 5),
        ({"epochs": 6, "max_steps": 7}, "lora", "epochs", 7),
    ],
)
def test_steps_follow_epochs_and_max_steps(training: Any, name: str, equal: Any, steps: int, place: Path) -> None:
    config = settings(place, training={"batch_size": 8, **training})
    job = replace(load(settings(place)), config=config)
    assert planned_steps(job, entries([name])[0], equal=equal) == steps


def test_a_training_that_diverges_is_a_result(place: Path, tmp_path: Path) -> None:
    run = trained(settings(place), "full", tmp_path, rate=1e20)
    assert (run.status, "not finite" in run.compared["failed"]) == ("failed", True)


def test_a_control_may_draw_fewer_rows_than_classes(place: Path) -> None:
    control = {"enabled": False, "fraction": 0.005, "preset": "paper"}
    assert dry_run(settings(place, quality=control, ranks={"policy": "fixed"}))["rows"]["train"] == ROWS


def checked(config: Config, *methods: str, finished: tuple[int, ...] = ()) -> dict[int, str]:
    return preflight(config, entries(methods), 0, finished=finished, equal="steps")


def test_preflight_accepts_what_can_be_trained(place: Path) -> None:
    paper = few(place, quality={"fraction": 0.5, "preset": "paper"})
    assert not checked(paper, "full", "lora", "dora", "adalora", "elalora", "tsqlora", "lora+gradnorm")
    assert not checked(few(place), "adalora+quality", "dora+el2n")


@pytest.mark.parametrize(
    ("sections", "method", "key"),
    [
        ({}, "full+gradnorm", ""),
        ({}, "dora+gradnorm", ""),
        ({}, "adalora+gradnorm", ""),
        ({}, "elalora+gradnorm", ""),
        ({"model": {"dtype": "bfloat16"}}, "full", "bfloat16"),
        ({"ranks": {"mean": 2.5}}, "lora", "ranks.mean"),
        ({"ranks": {"policy": "tsqlroa"}}, "tsqlora", "ranks.policy"),
        ({"training": {"epochs": 1}}, "elalora", "5 optimizer steps"),
        ({"training": {"epochs": 1, "batch_size": 36}}, "adalora", "1 optimizer steps"),
        ({"training": {"label_smoothing_factor": 0.1}}, "adalora", "training.label_smoothing_factor"),
        ({"quality": {"fraction": 0.5, "weights": {"density_ratio": 1.0}}}, "tsqlora", "density_ratio"),
        ({"quality": {"fraction": 0.01}}, "lora+loss", "1 rows"),
    ],
)
def test_preflight_names_the_entry_that_cannot_be_trained(
    sections: dict[str, Any], method: str, key: str, place: Path
) -> None:
    config = few(place, **{name: values for name, values in sections.items() if name != "model"})
    config = config.model_copy(update={"model": config.model.model_copy(update=sections.get("model", {}))})
    name = entries([method])[0].name.replace("+", r"\+")
    with pytest.raises((SettingsError, UnsupportedError), match=rf"^{name}: .*{key}"):
        checked(config, "lora" if "model" in sections else "full", method)


def test_hashes_are_those_of_a_runs_own_rows(place: Path) -> None:
    config = few(place)
    hashes = checked(config, "lora", finished=(0, 3))
    for seed, value in hashes.items():
        training = config.training.model_copy(update={"seed": seed})
        assert value == data_hash(load(config.model_copy(update={"training": training})).data)
    assert len(set(hashes.values())) == 2  # the seed splits off the validation rows


def test_preflight_runs_in_its_own_process_and_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained")

    monkeypatch.setattr(comparison, "run_cell", never)
    with pytest.raises(UnsupportedError, match=r"^dora\+gradnorm: "):
        compare(few(place), ["lora", "dora+gradnorm"], seeds=[0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_of_changed_data_are_not_mixed_with_new_ones(place: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(80))
    config = load_config(write_config(tmp_path / "c.yaml", place / "model", train, training={"epochs": 1}))
    compare(config, ["lora"], seeds=[0], out=tmp_path / "out")
    write_jsonl(train, make_rows(80, seed=1))
    with pytest.raises(DataError, match=r"lora\+all\.0"):
        compare(config, ["lora", "lora+random"], seeds=[0], out=tmp_path / "out")
