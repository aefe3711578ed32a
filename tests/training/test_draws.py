"""QualityCallback draws a QualitySubset's epochs, in any order of the callbacks, and refuses what spoils a draw."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import TrainingArguments

import tsqlora as tsq
from scoring import assert_same, drawing, quality_by
from stock import At, fails_at, make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.errors import SettingsError
from tsqlora.training.quality_callback import require_fresh_draws

DATA = moods()
EPOCHS = 5
"""Of half the rows, 4 steps each."""


def half(**options: Any) -> tsq.QualitySubset:
    return tsq.QualitySubset(DATA, 0.5, seed=0, **options)


def looking(data: Any, **options: Any) -> tsq.QualityCallback:
    return quality_by(data, **{"reference": 40} | options)


def train(data: tsq.QualitySubset, folder: Path, *callbacks: Any, **further: Any) -> Any:
    trainer = make_trainer(slotted_bert(), data, folder, list(callbacks), **({"num_train_epochs": EPOCHS} | further))
    trainer.train()
    return trainer


class Drawn(At):
    """The rows of each epoch."""

    def __init__(self, data: tsq.QualitySubset) -> None:
        self.rows = list[list[int]]()
        super().__init__("epoch_end", lambda *_: self.rows.append(sorted(data.indices.tolist())))


def test_the_callback_itself_draws_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate calls set_epoch as well, but with several processes not under every sampler."""
    monkeypatch.setattr(tsq.QualitySubset, "set_epoch", lambda *_: None)
    data = half()
    data._draw(0)
    drawn = Drawn(data)
    train(data, tmp_path, drawing(data), drawn, num_train_epochs=2)
    assert drawn.rows == [sorted(data.draw(epoch).tolist()) for epoch in range(2)]


def test_an_epoch_that_another_callback_stops_is_over(tmp_path: Path) -> None:
    def stop(state: Any, control: Any, _: Any) -> None:
        control.should_epoch_stop = state.global_step in (2, 6)  # within an epoch, and with its last step

    data = half()
    drawn = Drawn(data)
    callbacks = (looking(data), paper.RankCallback(interval=4), At("step_end", stop), drawn)
    trainer = train(data, tmp_path, *callbacks, num_train_epochs=3)
    assert [int(entry) for entry in (trainer.state.epoch, trainer.state.global_step)] == [3, 10]
    assert drawn.rows == [sorted(data.draw(epoch).tolist()) for epoch in range(3)]


def test_the_order_of_the_callbacks_does_not_matter(tmp_path: Path) -> None:
    ends, quality, events = [], [], []
    for order in (1, -1):
        data = half()
        ranks = paper.RankCallback(interval=4, samples=16, schedule=paper.RankSchedule(moves=3))
        trainer = train(data, tmp_path / str(order), *[looking(data), ranks][::order])
        ends.append(trainer.model.state_dict())
        quality.append(data.scores.quality)  # type: ignore[union-attr]
        events.append(ranks.events)
    assert events[0] == events[1]
    assert [(event.step, event.reason) for event in events[0]][:2] == [(0, "start"), (4, "adjustment")]
    assert events[0][0].ranks == events[0][0].target
    assert np.array_equal(*quality)
    assert_same(*ends, "weights")


def test_a_training_without_a_look_behind_one_that_was_cut_off_is_a_random_one(tmp_path: Path) -> None:
    data = half()
    with pytest.raises(KeyboardInterrupt):
        train(
            data, tmp_path / "first", looking(data, weights={"loss": 1.0}), fails_at("step_end", 3, KeyboardInterrupt)
        )
    assert data.drawn_by == "QualityCallback"
    ranks, drawn = paper.RankCallback(interval=4), Drawn(data)
    train(data, tmp_path / "second", drawing(data), ranks, drawn)
    assert drawn.rows == [sorted(half().draw(epoch).tolist()) for epoch in range(EPOCHS)]
    assert (data.scores, data.drawn_by) == (None, None)
    assert not ranks.loop.started  # type: ignore[union-attr]


def test_scores_that_a_user_has_set_stay(tmp_path: Path) -> None:
    data, again = half(), half()
    train(data, tmp_path / "first", looking(data, weights={"loss": 1.0}))
    assert data.scores is not None
    again.use(data.scores, 0)
    ranks = paper.RankCallback(interval=4, samples=16)
    train(again, tmp_path / "second", ranks)
    assert (again.scores is data.scores, ranks.loop.started) == (True, True)


def test_the_trainers_seed_decides_rows_and_order_unless_the_subset_has_its_own(tmp_path: Path) -> None:
    def rows(name: str, of_trainer: int, **options: Any) -> list[list[int]]:
        data = tsq.QualitySubset(DATA, 0.5, **options)
        train(data, tmp_path / name, drawing(data), drawn := Drawn(data), seed=of_trainer, num_train_epochs=2)
        return drawn.rows

    first, again, other = rows("first", 1), rows("again", 1), rows("other", 2)
    assert first == again
    assert {*first[0], *first[1]} == {*other[0], *other[1]}, "two epochs of a half have all rows"
    assert first[0] != other[0]
    assert rows("own", 1, seed=5) == rows("own too", 2, seed=5) != first


# --------------------------------------------------------------------------------------------- refusals

LENGTHS: dict[str, Any] = {"lengths": [len(row["input_ids"]) for row in DATA], "batch_size": 8}
REFUSED: dict[str, tuple[Any, str]] = {
    "a plain list": (lambda folder: looking(DATA), r"QualityCallback got a list; .*tsqlora\.QualitySubset\(rows\)"),
    "an unknown term": (lambda folder: train(data := half(), folder, looking(data, terms=("lerned",))), "lerned"),
    "one reference row": (
        lambda folder: train(data := half(), folder, looking(data, reference=1)),
        "reference is 1; it must be a whole number of rows, at least 2",
    ),
    "another data set": (lambda folder: train(half(), folder, looking(half())), "need the same QualitySubset"),
    "two callbacks": (
        lambda folder: train(data := half(), folder, looking(data), looking(data)),
        "the Trainer has two QualityCallbacks",
    ),
    "one checkpoint at a time": (
        lambda folder: train(data := half(), folder, looking(data), save_strategy="epoch", save_total_limit=1),
        "save_total_limit",
    ),
} | {
    str(further): (
        lambda folder, further=further: train(data := half(**LENGTHS), folder, drawing(data), **further),
        key,
    )
    for further, key in (
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "persistent_workers keeps an old draw"),
        ({"train_sampling_strategy": "batch_rebalance"}, "reads the rows' lengths once"),
        ({"train_sampling_strategy": "random"}, "mixes them again"),
    )
}
"""What is called with an output_dir, and the key of its SettingsError."""


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_the_first_step(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, key = REFUSED[case]
    monkeypatch.setattr(tsq.QualitySubset, "begin_epoch", lambda *_: pytest.fail("an epoch began"))
    with pytest.raises(SettingsError, match=key):
        call(tmp_path)


def test_evaluating_on_the_subset_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    data, steps = half(), list[int]()
    note = At("step_end", lambda state, *_: steps.append(state.global_step))
    further = {"evaluate_on": {"train": data}, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(SettingsError, match="eval_dataset is the QualitySubset that is trained on"):
        train(data, tmp_path, drawing(data), note, **further)
    assert steps == [1, 2]
    train(data, tmp_path, drawing(data), num_train_epochs=1).evaluate(data)  # no callback draws any more


def test_another_epoch_is_refused_while_the_callback_draws() -> None:
    data = half()
    data.begin_epoch(3)
    data.set_epoch(3)
    with pytest.raises(SettingsError, match=r"set_epoch\(0\): QualityCallback draws this QualitySubset and is in"):
        data.set_epoch(0)
    assert data.indices.tolist() == data.draw(3).tolist()
    data.drawn_by = None
    data.set_epoch(0)
    assert data.indices.tolist() == data.draw(0).tolist()


def test_a_sampler_by_place_passes_in_silence_also_of_two_processes(tmp_path: Path) -> None:
    trainer = make_trainer(slotted_bert(), half(), tmp_path, [], train_sampling_strategy="random")
    loader = prepare_data_loader(trainer.get_train_dataloader(), num_processes=2, process_index=0)
    require_fresh_draws(trainer.args, loader)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sampler_that_fits_certain_rows_is_refused(processes: int, tmp_path: Path) -> None:
    weighted = WeightedRandomSampler([1.0] * 8, 8)
    loader: Any = DataLoader(tsq.QualitySubset(range(8), 1.0), batch_size=2, sampler=weighted)
    loader = prepare_data_loader(loader, num_processes=processes, process_index=0)
    with pytest.raises(SettingsError, match="WeightedRandomSampler"):
        require_fresh_draws(TrainingArguments(str(tmp_path), use_cpu=True), loader)
