"""What a training would raise is raised before the first is begun, and names the entry and the cure."""

from pathlib import Path
from typing import Any

import pytest

from runs import make_rows, write_config, write_jsonl
from tsqlora.compare import comparison
from tsqlora.compare.comparison import compare
from tsqlora.compare.methods import entries
from tsqlora.compare.preflight import preflight
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.run.config import Config, load_config
from tsqlora.run.job import load


def settings(place: Path, **sections: Any) -> Config:
    return load_config(write_config(place / "c.yaml", place / "model", place / "train.jsonl", **sections))


def checked(config: Config, *methods: str, known: tuple[int, ...] = ()) -> dict[int, str]:
    return preflight(config, entries(methods), 0, known=known, equal="steps")


def test_what_can_be_trained_passes(place: Path) -> None:
    paper = settings(place, quality={"fraction": 0.5, "preset": "paper"})
    assert not checked(paper, "full", "lora", "dora", "adalora", "elalora", "eva", "tsqlora", "lora+gradnorm")
    assert not checked(settings(place), "adalora+quality", "dora+el2n", "eva+gradnorm")


@pytest.mark.parametrize("method", ["full", "dora", "adalora", "elalora"])
def test_scoring_by_gradients_that_a_method_does_not_show_is_refused(method: str, place: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{method}\+gradnorm: "):
        checked(settings(place), "lora+gradnorm", f"{method}+gradnorm")


@pytest.mark.parametrize(
    ("sections", "method", "message"),
    [
        ({"ranks": {"mean": 2.5}}, "lora", r"lora\+all: ranks.mean is 2.5, and lora needs a whole rank"),
        ({"training": {"epochs": 1}}, "elalora", r"elalora\+all: the run has 5 optimizer steps, and ElaLoRA would"),
        (
            {"training": {"epochs": 1, "batch_size": 36}},
            "adalora",
            r"adalora\+all: .* 1 optimizer steps",
        ),
        ({"training": {"label_smoothing_factor": 0.1}}, "adalora", r"adalora\+all: training.label_smoothing_factor is"),
        ({"training": {"batch_size": 100}}, "eva", r"eva\+all: EVA needs 100 rows"),
        ({"ranks": {"mean": 2.0, "max": 1}}, "eva", r"eva\+all: ranks.max is 1, below ranks.mean"),
        ({"quality": {"fraction": 0.5, "weights": {"ifd": 1.0}}}, "tsqlora", r"tsqlora\+quality: quality term 'ifd'"),
        (
            {"quality": {"fraction": 0.01}},
            "lora+loss",
            r"lora\+loss: a draw of 1 rows cannot hold",
        ),
    ],
)
def test_settings_that_an_entry_cannot_have_are_refused_by_its_name(
    sections: dict[str, Any], method: str, message: str, place: Path
) -> None:
    with pytest.raises((SettingsError, UnsupportedError), match=message):
        checked(settings(place, **sections), "full", method)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"policy": "tsqlroa"}, "ranks.policy 'tsqlroa' is unknown"),
        ({"estimator": "smapled"}, "unknown ranks.estimator 'smapled'"),
        ({"mean": 2.0, "min": 3}, "budget .* is below the .* parameters that rank 3 needs"),
    ],
)
def test_ranks_that_our_own_training_would_refuse_are_refused_before_lora_is_trained(
    ranks: dict[str, Any], message: str, place: Path
) -> None:
    with pytest.raises(SettingsError, match=rf"tsqlora\+quality: .*{message}"):
        checked(settings(place, ranks=ranks, training={"epochs": 12}), "lora", "tsqlora")


def test_weights_that_full_cannot_train_are_told_before_others_train(place: Path) -> None:
    config = settings(place)
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    assert not checked(half, "lora", "adalora")
    with pytest.raises(UnsupportedError, match=r"full\+all: full trains the base's own weights, and .* is bfloat16"):
        checked(half, "lora", "full")


def test_hashes_are_those_of_a_cells_own_rows(place: Path) -> None:
    config = settings(place)
    hashes = checked(config, "lora", known=(0, 3))
    for seed, found in hashes.items():
        training = config.training.model_copy(update={"seed": seed})
        assert found == load(config.model_copy(update={"training": training})).data.hash
    assert len(set(hashes.values())) == 2  # validation rows are split off by the seed


def test_a_comparison_is_checked_in_a_process_of_its_own_and_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained")

    monkeypatch.setattr(comparison, "run_cell", never)
    with pytest.raises(UnsupportedError, match=r"^dora\+gradnorm: "):
        comparison.compare(settings(place), ["lora", "dora+gradnorm"], seeds=[0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_data_is_told_and_not_mixed_with_what_is_known(place: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(80))
    config = load_config(write_config(tmp_path / "c.yaml", place / "model", train, training={"epochs": 1}))
    compare(config, ["lora"], seeds=[0], out=tmp_path / "out")
    write_jsonl(train, make_rows(80, seed=1))
    with pytest.raises(DataError, match=r"lora\+all_seed0_lr0.02.json is of other rows .* name another --out"):
        compare(config, ["lora", "lora+random"], seeds=[0], out=tmp_path / "out")
