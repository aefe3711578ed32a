"""Reporters hear of ranks and scores when they change, as of the Trainer's own logs, and nothing else changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.integrations import integration_utils

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.errors import SettingsError
from tsqlora.run import train as pipeline
from tsqlora.run.config import load_config
from tsqlora.training.record import RunRecord
from tsqlora.training.report_callback import CELL, GAP, NOWHERE, rank_map

Told = list[tuple[str, Any, int]]


class Writer:
    """Stands for TensorBoard's: keeps what it is given."""

    scalars: Told = []  # noqa: RUF012  (filled by the fixture's one run)
    histograms: Told = []  # noqa: RUF012
    images: Told = []  # noqa: RUF012

    def __init__(self, log_dir: str) -> None: ...
    def add_text(self, *told: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_histogram(self, name: str, values: Any, step: int) -> None:
        self.histograms.append((name, values, step))

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.images.append((name, pixels, step))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report_to")
    save_checkpoint(place / "model")
    write_jsonl(place / "train.jsonl", make_rows(80))
    return place


def train(place: Path, name: str, *overrides: str) -> RunRecord:
    logged = {"logging_strategy": "steps", "logging_steps": 3}
    training = {"epochs": 8, "learning_rate": 0.02, "batch_size": 8, **logged}
    config = write_config(place / "c.yaml", place / "model", place / "train.jsonl", training=training)
    return pipeline.train(load_config(config, ["data.max_length=16", *overrides]), place / name)


@pytest.fixture(scope="module")
def reported(place: Path) -> Iterator[RunRecord]:
    class Board(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            self.tb_writer, self.logging_dir, self._SummaryWriter = None, None, Writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
        patch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
        yield train(place, "reported", "training.report_to=tensorboard")


def test_each_adjustment_is_told_at_its_step(reported: RunRecord) -> None:
    assert len(reported.rank_events) > 2
    moved = {step: value for name, value, step in Writer.scalars if name == "train/ranks/moved"}
    # The first ranks are set before a step, and told after it.
    assert moved == {e.step + (e.reason == "start"): e.moved for e in reported.rank_events}
    last = reported.rank_events[-1]
    values = {name: value for name, value, step in Writer.scalars if step == last.step}
    for layer, rank in last.ranks.items():
        assert values[f"train/rank/{layer}"] == rank
        assert values[f"train/sensitivity/{layer}"] == last.sensitivity[layer]
    assert values["train/ranks/parameters"] == last.used


def test_a_scoring_is_told_once(reported: RunRecord) -> None:
    told = [(value, step) for name, value, step in Writer.scalars if name == "train/quality/left_out"]
    assert told == [(0, reported.quality["scores"]["step"] + 1)]
    assert "train/quality/wrong_labels" in {name for name, *_ in Writer.scalars}


def test_histogram_and_map_come_with_each_adjustment(reported: RunRecord) -> None:
    for (_, values, _), (_, pixels, _), event in zip(
        Writer.histograms, Writer.images, reported.rank_events, strict=True
    ):
        assert sorted(values) == sorted(event.ranks.values())
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8


def test_what_the_trainer_logs_and_the_run_itself_are_as_without_reporters(reported: RunRecord, place: Path) -> None:
    plain = train(place, "plain")
    assert plain.history == reported.history
    assert plain.rank_events == reported.rank_events
    losses = [value for name, value, _ in Writer.scalars if name == "train/loss"]
    assert losses == [entry["loss"] for entry in plain.history if "loss" in entry]


@pytest.mark.parametrize(
    ("reporter", "why"),
    [
        ("nothing-like-it", "training.report_to: nothing-like-it is not supported, only azure_ml"),
        ("wandb", "training.report_to: wandb is not installed; install it with: pip install wandb"),
    ],
)
def test_a_reporter_that_is_not_there_is_told_before_training(
    reporter: str, why: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(SettingsError, match=why):
        train(place, "refused", f"training.report_to={reporter}")
    assert not (place / "refused").exists()


def test_the_rank_map_has_a_cell_for_each_layer_and_is_darker_where_ranks_are_higher() -> None:
    ranks = {"a.0.query": 0, "a.0.value": 4, "a.1.query": 8, "pooler": 2}
    pixels = rank_map(ranks)
    side = CELL + GAP
    assert pixels.shape == (3 * side + GAP, 3 * side + GAP, 3)
    middle = pixels[GAP + CELL // 2 :: side, GAP + CELL // 2 :: side].astype(int).sum(axis=2)
    assert middle[0, 0] > middle[1, 0] > middle[0, 1]
    assert (pixels[GAP + CELL // 2 + side, GAP + CELL // 2 + side] == NOWHERE).all(), "no such layer"
