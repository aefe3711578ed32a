"""Terms from training's own passes, in a stock Trainer."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import TrainerCallback

import tsqlora as tsq
from scoring import assert_same
from stock import make_trainer, moods, slotted_bert
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.training.infobatch_callback import InfoBatchCallback
from tsqlora.training.row_weights import labels_of

DATA = moods()


def train(folder: Path, callbacks: Any = None, **further: Any) -> tuple[tsq.QualitySubset, Any]:
    data = tsq.QualitySubset(DATA, 0.5)
    made = [] if callbacks is None else callbacks(data)
    trainer = make_trainer(slotted_bert(), data, folder, made, **({"num_train_epochs": 3} | further))
    trainer.train()
    return data, trainer


def test_every_row_that_was_trained_on_has_its_terms(tmp_path: Path) -> None:
    data, _ = train(tmp_path, lambda data: [tsq.HarvestCallback(data)])
    table = pq.read_table(tmp_path / "harvest.parquet")
    assert table["id"].to_pylist() == list(range(len(DATA)))
    assert table["label"].to_pylist() == [row["labels"] for row in DATA]
    # Three epochs of half the rows are a pass and a half.
    assert table["gradient_norm"].null_count == table["loss"].null_count == 0
    assert min(table["gradient_norm"].to_pylist()) > 0
    assert np.corrcoef(table["loss"].to_pylist(), table["el2n"].to_pylist())[0, 1] > 0.8
    # The first batch had no mean gradient before it; its rows came again, or did not.
    assert table["convergence"].null_count <= 8
    about = json.loads(table.schema.metadata[b"tsqlora"])
    assert (about["harvested"], about["exact"], about["unseen"]) == (True, False, 0)
    assert not data._listeners


def test_rows_that_were_never_drawn_are_null(tmp_path: Path) -> None:
    train(tmp_path, lambda data: [tsq.HarvestCallback(data, gradient=False)], num_train_epochs=1)
    table = pq.read_table(tmp_path / "harvest.parquet")
    assert table["loss"].null_count == len(DATA) // 2
    assert table.column_names == ["id", "label", "loss", "el2n"]


def test_training_is_bit_for_bit_what_it_is_without(tmp_path: Path) -> None:
    def both(data: tsq.QualitySubset) -> list[Any]:
        return [tsq.QualityCallback(data, reference=40), tsq.RankCallback(interval=4, moves=3, samples=16)]

    ended = []
    for harvest in (False, True):
        _, trainer = train(
            tmp_path,
            lambda data, harvest=harvest: [*([tsq.HarvestCallback(data)] if harvest else []), *both(data)],
            num_train_epochs=8,
            gradient_accumulation_steps=2,
        )
        ended.append(trainer.model.state_dict())
    assert_same(ended[0], ended[1], "weights")
    assert (tmp_path / "harvest.parquet").exists()


def test_label_smoothing_is_taken_over(tmp_path: Path) -> None:
    train(tmp_path, lambda data: [tsq.HarvestCallback(data)], label_smoothing_factor=0.1)
    assert min(pq.read_table(tmp_path / "harvest.parquet")["loss"].to_pylist()) > 0.1


def test_a_resumed_run_is_refused_for_its_first_rows_would_be_lacking(tmp_path: Path) -> None:
    _, trainer = train(tmp_path, lambda data: [tsq.HarvestCallback(data)], save_strategy="steps", save_steps=4)
    with pytest.raises(UnsupportedError, match=r"nothing in checkpoints, so rows .* before step 8 would lack .* anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_training_that_failed_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        fails = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.fails and state.global_step == 3:
                raise ZeroDivisionError

    fail, data = Fail(), tsq.QualitySubset(DATA, 0.5)
    callback = tsq.HarvestCallback(data)
    trainer = make_trainer(slotted_bert(), data, tmp_path, [callback, fail], num_train_epochs=2)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    fail.fails = False
    trainer.train()
    assert not data._listeners
    assert pq.read_table(tmp_path / "harvest.parquet")["loss"].null_count == 0


@pytest.mark.parametrize("kind", [tsq.HarvestCallback, InfoBatchCallback])
def test_after_ctrl_c_another_trainer_of_the_same_model_trains_as_if_there_had_been_none(
    kind: Callable[[tsq.QualitySubset], TrainerCallback], tmp_path: Path
) -> None:
    """As in a notebook, which keeps the frames of the last error, and with them the Trainer."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    model, kept, hooks = slotted_bert(), [], []
    for more in ([Interrupt()], []):
        data = tsq.QualitySubset(DATA, 1.0)
        kept.append(make_trainer(model, data, tmp_path, [kind(data), *more], num_train_epochs=2))
        with pytest.raises(KeyboardInterrupt) if more else nullcontext():
            kept[-1].train()
        hooks.append(len(model._forward_hooks))
    assert hooks[0] > hooks[1] == 0
    assert not any(trainer.train_dataset._listeners for trainer in kept)


def test_rows_without_the_column_are_refused_with_its_name(tmp_path: Path) -> None:
    data = tsq.QualitySubset([{"input_ids": [1, 2], "label": 0}] * 8, 0.5)
    with pytest.raises(DataError, match="columns input_ids, label, and labels are read from 'labels'; rename theirs"):
        labels_of(data)


def test_workers_that_hide_the_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set dataloader_num_workers to 0"):
        train(tmp_path, lambda data: [tsq.HarvestCallback(data)], dataloader_num_workers=1)


@pytest.mark.parametrize("kind", [tsq.HarvestCallback, InfoBatchCallback])
def test_several_processes_are_refused_by_what_sees_only_its_own_rows(
    kind: type[tsq.HarvestCallback] | type[InfoBatchCallback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def announces_two(data: tsq.QualitySubset) -> list[TrainerCallback]:
        callback = kind(data)
        begin = callback.on_train_begin

        def among_two(args: Any, *given: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(type(args), "world_size", property(lambda self: 2))
            begin(args, *given, **kwargs)

        monkeypatch.setattr(callback, "on_train_begin", among_two)
        return [callback]

    with pytest.raises(SettingsError, match=rf"{kind.__name__} knows one process's (rows|losses) only"):
        train(tmp_path, announces_two)
