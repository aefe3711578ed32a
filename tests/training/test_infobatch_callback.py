from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import tsqlora as tsq
from scoring import cross_entropy, logits_of
from stock import make_trainer, moods, slotted_bert
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.quality.infobatch import info_batch
from tsqlora.training.infobatch_callback import InfoBatchCallback

DATA = moods()
EPOCHS = 5
"""Of half the rows, four steps each: two until every row was seen."""


class Watch(TrainerCallback):
    """The rows and weights of each step's epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[list[int], list[float] | None]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        data = kwargs["train_dataloader"].dataset
        weights = None if data.weights is None else data.weights.tolist()
        self.seen[state.global_step] = (data.indices.tolist(), weights)


def trainer(
    folder: Path, *also: TrainerCallback, model: Any = None, data: Any = DATA, **further: Any
) -> tuple[InfoBatchCallback, Trainer]:
    subset = tsq.QualitySubset(data, 0.5)
    callback = InfoBatchCallback(subset)
    made = slotted_bert() if model is None else model
    return callback, make_trainer(made, subset, folder, [callback, *also], **({"num_train_epochs": EPOCHS} | further))


def test_losses_are_those_that_rows_last_had_in_training(tmp_path: Path) -> None:
    model = slotted_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    callback, made = trainer(tmp_path, model=model, learning_rate=0.0, num_train_epochs=2)
    made.train()
    wanted = cross_entropy(logits_of(model, DATA), torch.tensor([row["labels"] for row in DATA]))
    np.testing.assert_allclose(callback.losses, wanted.numpy(), rtol=1e-5)


def test_epochs_are_the_controls_until_every_row_was_seen_and_then_by_losses(tmp_path: Path) -> None:
    watch = Watch()
    callback, made = trainer(tmp_path, watch)
    made.train()
    control = tsq.QualitySubset(DATA, 0.5)
    for step in range(8):
        assert watch.seen[step] == (control.draw(step // 4).tolist(), None)
    rows, weights = watch.seen[19]
    found, own = info_batch(callback.drawn_by, size=len(DATA) // 2, rng=np.random.default_rng([0, 6, 4]))
    assert weights is not None
    assert dict(zip(rows, weights, strict=True)) == dict(zip(found.tolist(), own.tolist(), strict=True))
    assert max(weights) > 1
    assert watch.seen[8] != watch.seen[12] != watch.seen[16]
    # A loss may fall behind one that is older; it never stays as it was when the epoch began.
    assert (callback.losses[rows] != callback.drawn_by[rows]).all()


@pytest.mark.parametrize("step", [3, 8, 9, 11, 12, 18])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(step: int, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1}
    watch, again = Watch(), Watch()
    callback, made = trainer(tmp_path, watch, **saves)
    made.train()
    other, resumed = trainer(tmp_path, again, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert again.seen == {at: what for at, what in watch.seen.items() if at >= step}
    np.testing.assert_array_equal(other.losses, callback.losses)
    for name, value in made.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, resumed.model.state_dict()[name]), name  # type: ignore[union-attr]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, num_train_epochs=2, **saves)[1].train()
    with pytest.raises(DataError, match="the run that is resumed had 64 rows, and there are 32; resume with"):
        trainer(tmp_path, data=DATA[:32], **saves)[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-4" / "tsqlora_infobatch.safetensors").unlink()
    with pytest.raises(TsqLoraError, match=r"tsqlora_infobatch\.safetensors is missing"):
        trainer(tmp_path, **saves)[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("first", [True, False])
def test_two_that_draw_are_refused(first: bool, tmp_path: Path) -> None:
    subset = tsq.QualitySubset(DATA, 0.5)
    callbacks = [InfoBatchCallback(subset), tsq.QualityCallback(subset, reference=40)][:: 1 if first else -1]
    with pytest.raises(SettingsError, match="InfoBatchCallback and QualityCallback would both draw the rows; leave"):
        make_trainer(slotted_bert(), subset, tmp_path, callbacks, num_train_epochs=EPOCHS).train()


def test_another_data_set_than_the_trainers_is_refused(tmp_path: Path) -> None:
    callback = InfoBatchCallback(tsq.QualitySubset(DATA, 0.5))
    with pytest.raises(SettingsError, match="need the same QualitySubset"):
        make_trainer(slotted_bert(), tsq.QualitySubset(DATA, 0.5), tmp_path, [callback]).train()


def test_workers_that_hide_the_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="InfoBatchCallback must see which rows are handed out; set dataloader_num"):
        trainer(tmp_path, dataloader_num_workers=1)[1].train()


def test_its_rows_are_not_harvested(tmp_path: Path) -> None:
    subset = tsq.QualitySubset(DATA, 0.5)
    callbacks = [tsq.HarvestCallback(subset), InfoBatchCallback(subset)]
    with pytest.raises(UnsupportedError, match="the rows of this epoch have weights; leave it out"):
        make_trainer(slotted_bert(), subset, tmp_path, callbacks, num_train_epochs=EPOCHS).train()


def test_nothing_is_left_on_the_data(tmp_path: Path) -> None:
    callback, made = trainer(tmp_path)
    made.train()
    assert callback.data.policy is None
    assert not callback.data._listeners
