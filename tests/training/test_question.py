"""The question to the pool in a stock Trainer, whatever it does with batches; and what a user's own run may ask for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import tsqlora as tsq
from pools import CONTRARY, FEW, NUMBERS, OTHERS, POOL, ROWS, TRUSTED, UNIQUE, UNSEEN, Handed
from scoring import assert_same, quality_by
from stock import At, Falling, make_trainer, slotted_bert, stops_at
from tsqlora.auditing.draw.epochs import trusted_steps
from tsqlora.auditing.labels import question

EVERY: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def make(
    folder: Path,
    *also: TrainerCallback,
    trusted: Any = CONTRARY,
    pool: Any = POOL,
    rule: dict[str, Any] | None = None,
    first: tuple[TrainerCallback, ...] = (),
    **further: Any,
) -> tuple[Trainer, tsq.QualityCallback]:
    """Four epochs of ten steps; the question comes after step 27, and the answer counts from step 29 on."""
    data = tsq.QualitySubset(pool, 0.5, seed=0, trusted=trusted)
    quality = quality_by(data, **(rule or {}))
    options = {"num_train_epochs": 4, "train_sampling_strategy": "random"} | further
    return make_trainer(slotted_bert(), data, folder, [*first, quality, *also], **options), quality


def ran(*arguments: Any, **options: Any) -> tuple[Trainer, tsq.QualityCallback]:
    trainer, quality = make(*arguments, **options)
    trainer.train()
    return trainer, quality


def answer_of(quality: tsq.QualityCallback) -> dict[str, Any]:
    assert quality.question is not None
    return quality.question


def held_out(quality: tsq.QualityCallback) -> list[int]:
    assert quality.data.scores is not None
    return np.flatnonzero(quality.data.scores.left_out_as("held out")).tolist()


def assert_order(handed: dict[int, list[int]], quality: tsq.QualityCallback, total: int) -> None:
    """Neither trusted nor held-out rows, nor their copies, before the answer; then what it says."""
    held = {NUMBERS[tuple(POOL[j]["input_ids"])] for j in held_out(quality)}
    assert len(held) == 16
    answer, first = answer_of(quality), quality.last.schedule.trusted_step
    assert list(handed) == list(range(total))
    assert 0 < answer["step"] < first == answer["from_step"] - 1 < total
    before = {row for step in range(first) for row in handed[step]}
    assert before <= {*range(ROWS)} - held
    behind = [row for step in range(first, total) for row in handed[step]]
    if not answer["contradicted"]:
        assert {*behind} & held or len(behind) < FEW
        assert {*behind} & {*range(ROWS, ROWS + FEW)}
        return
    assert len(behind) >= FEW or answer["from_step"] > total - 2  # workers of a short run have read far ahead
    passes = [behind[j : j + FEW] for j in range(0, len(behind), FEW)]
    assert all(sorted(rows) == list(range(ROWS, ROWS + FEW)) for rows in passes if len(rows) == FEW)
    assert {*passes[-1]} <= {*range(ROWS, ROWS + FEW)}
    assert len(passes[0]) < FEW or len(passes) < 2 or passes[0] != passes[1]


SAYS = pytest.mark.filterwarnings("ignore:the pool:UserWarning")


@SAYS
@pytest.mark.parametrize(
    ("trusted", "further", "total"),
    [
        (CONTRARY, {}, 40),
        (CONTRARY, {"max_steps": 41}, 41),
        (CONTRARY, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 28),
        (CONTRARY, {"dataloader_num_workers": 2, "num_train_epochs": 1}, 10),
        (TRUSTED, {"dataloader_num_workers": 2}, 40),
        (TRUSTED, {"train_sampling_strategy": "sequential"}, 40),
        (TRUSTED, {"num_train_epochs": 1}, 10),
    ],
    ids=["plain", "41 steps", "batches of a step", "workers, one epoch", "not, workers", "not, in order", "not, one"],
)
def test_the_pool_comes_first_and_is_asked(trusted: Any, further: dict[str, Any], total: int, tmp_path: Path) -> None:
    trainer, quality = ran(tmp_path, handed := Handed(), trusted=trusted, **further)
    assert trainer.state.global_step == total
    assert_order(handed.steps, quality, total)
    answer = answer_of(quality)
    if total == 40:  # after two epochs the model has learned what the pool teaches
        assert answer["contradicted"] == (trusted is CONTRARY)
    assert (answer["trusted_rows"], answer["pool_rows"], answer["suspects"]) == (FEW, 16, 0)
    assert quality.record.record.cost["question"].forward == FEW + 16
    (note,) = [note for note in quality.notes if note.startswith("the pool")]
    verb = "contradicts" if answer["contradicted"] else "does not contradict"
    assert note.startswith(f"the pool {verb} the trusted rows: on held-out rows of the pool the model has accuracy")
    assert quality.summary()["quality"]["question"] == answer


@SAYS
def test_copies_of_held_out_rows_wait_with_them_and_a_class_of_copies_stays_in_training(tmp_path: Path) -> None:
    """Five rows of class 1, twenty times: a tenth of the different rows is held out, not all of a class."""
    zeros, ones = ([row for row in UNIQUE if row["labels"] == label] for label in (0, 1))
    pool, trusted = [*zeros[:100], *(ones[:5] * 20)], [*zeros[100:116], *ones[5:21]]
    _, quality = ran(tmp_path, handed := Handed(), pool=pool, trusted=trusted)
    held = held_out(quality)
    assert 0 < sum(j >= 100 for j in held) <= 40
    assert answer_of(quality)["pool_rows"] == 10
    before = {row for step in range(quality.last.schedule.trusted_step) for row in handed.steps[step]}
    assert before
    assert not before & {NUMBERS[tuple(pool[j]["input_ids"])] for j in held}


def test_too_few_trusted_rows_are_mixed_in_from_the_start(tmp_path: Path) -> None:
    trusted = [*TRUSTED[:31], TRUSTED[31] | {"reviewed_as": "suspect"}]
    _, quality = ran(tmp_path, handed := Handed(), trusted=trusted)
    (note,) = [note for note in quality.summary()["notes"] if note.startswith("trusted rows are mixed in")]
    assert "needs 32 trusted rows besides the 1 that were reviewed as suspects, and there are 31" in note
    for epoch in range(4):
        rows = {row for step in range(10 * epoch, 10 * epoch + 10) for row in handed.steps[step]}
        assert {NUMBERS[tuple(row["input_ids"])] for row in trusted} <= rows
    assert not held_out(quality)


AHEAD = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}


ZEROS = [row for row in UNIQUE[ROWS:] if row["labels"] == 0][:FEW]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pool": POOL[:60], "max_steps": 4}, "the pool has 0 rows to hold out, and the question needs 10"),
        ({"max_steps": 10, **AHEAD}, "a run of 10 steps has none behind the question"),
        ({"trusted": ZEROS, "max_steps": 10}, "they lack 1 of the classes"),
    ],
    ids=["a small pool", "read ahead", "a class lacks"],
)
def test_where_the_pool_cannot_be_asked_the_run_says_why(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    _, quality = ran(tmp_path, **options)
    assert answer_of(quality)["why_not"].startswith(why)
    mixed = f"trusted rows are mixed in with those of the pool: {why}"
    assert [note for note in quality.summary()["notes"] if note.startswith(mixed)]


@SAYS
def test_an_extended_run_keeps_its_answer(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 20}
    make(tmp_path, **saves)[0].train()
    trainer, quality = make(tmp_path, handed := Handed(), **saves, num_train_epochs=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    assert answer_of(quality)["contradicted"]
    assert {row >= ROWS for rows in handed.steps.values() for row in rows} == {True}
    make(tmp_path, **saves, per_device_train_batch_size=4)[0].train(resume_from_checkpoint=f"{tmp_path}/checkpoint-20")


@pytest.mark.filterwarnings("ignore:trusted rows are mixed in:UserWarning")
def test_losses_that_are_not_finite_are_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, with trusted rows mixed in, and says why."""
    monkeypatch.setattr(question, "standard_errors", lambda *_: float("nan"))
    trainer, quality = ran(tmp_path)
    assert trainer.state.global_step == 40
    assert not answer_of(quality)["contradicted"]
    assert "trusted rows are mixed in with those of the pool: losses are not finite" in quality.notes


@SAYS
def test_reviewed_suspects_do_not_count_in_the_question(tmp_path: Path) -> None:
    """They are trained on; the loss of rows that were hard to begin with is no evidence about the pool."""
    rows = [*TRUSTED, *(row | {"labels": 1 - row["labels"], "reviewed_as": "suspect"} for row in OTHERS[:16])]
    _, quality = ran(tmp_path, trusted=rows)
    assert (answer_of(quality)["trusted_rows"], answer_of(quality)["suspects"]) == (32, 16)
    assert not answer_of(quality)["contradicted"]


@SAYS
def test_a_plain_training_with_the_same_rows_draws_from_the_pool(tmp_path: Path) -> None:
    """The plan of draws belongs to the training, not to the rows."""
    _, quality = ran(tmp_path)
    assert answer_of(quality)["contradicted"]
    control = make_trainer(slotted_bert(), quality.data, tmp_path / "control", [handed := Handed()])
    control.train()
    assert sum(row < ROWS for rows in handed.steps.values() for row in rows) > 200


@SAYS
def test_rows_that_equal_a_trusted_row_leave_the_pool(tmp_path: Path) -> None:
    _, quality = ran(tmp_path, handed := Handed(), trusted=POOL[:FEW], num_train_epochs=8)
    before = {row for step in range(quality.last.schedule.trusted_step) for row in handed.steps[step]}
    assert before <= {*range(FEW, ROWS)}
    assert len(before) == ROWS - FEW - 12
    assert quality.data.scores is not None
    assert quality.data.scores.dropped == {"trusted row": FEW, "held out": 12}
    assert quality.looks[0]["head_start"]["rows"] == ROWS - FEW - 12
    assert f"{FEW} training rows are left out: a trusted row has the same input" in quality.summary()["notes"]


@pytest.mark.parametrize(
    ("total", "trusted", "a_step", "steps"),
    [(440, 128, 16, 132), (18_750, 128, 16, 160), (20, 12, 8, 6), (4, 12, 8, 2), (100, 640, 16, 40), (60, 640, 16, 30)],
    ids=["30 %", "20 passes", "a small table", "half at most", "a pass at least", "less than a pass"],
)
def test_trusted_rows_have_the_last_steps(total: int, trusted: int, a_step: int, steps: int) -> None:
    assert trusted_steps(total, trusted, a_step) == steps


@SAYS
def test_a_resume_with_other_trusted_rows_is_refused_and_renames_nothing(tmp_path: Path) -> None:
    make(tmp_path, **EVERY, max_steps=6)[0].train()
    there = sorted(path.name for path in tmp_path.iterdir())
    for rows in (OTHERS, [*TRUSTED[:-1], TRUSTED[-1] | {"labels": 1 - TRUSTED[-1]["labels"]}], None):
        other, _ = make(tmp_path, trusted=rows, **EVERY, max_steps=6)
        with pytest.raises(tsq.SettingsError, match=r"the resumed run had trusted rows \w{16}, and this one has"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert sorted(path.name for path in tmp_path.iterdir()) == there


BEST: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "falling", "evaluate_on": UNSEEN}
BEST |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4, "eval_steps": 4}


@SAYS
@pytest.mark.parametrize("trusted", [CONTRARY, TRUSTED], ids=["contradicted", "not"])
def test_validation_rows_choose_no_model_of_the_pool_that_contradicts(trusted: Any, tmp_path: Path) -> None:
    """Those of the pool would choose a model from before the trusted rows."""
    last: dict[str, torch.Tensor] = {}
    before_best = At("step_end", lambda _state, _control, further: last.update(weights(further["model"])))
    trainer, quality = ran(tmp_path, before_best, trusted=trusted, compute_metrics=Falling(), **BEST)
    contradicted = trusted is CONTRARY
    assert answer_of(quality)["contradicted"] == contradicted
    assert sum("it keeps its last model" in note for note in quality.notes) == contradicted
    if contradicted:
        assert json.loads((tmp_path / "run.json").read_text())["metrics"]["validation"]["falling"] < 0.95
        assert trainer.state.best_model_checkpoint is None
        assert_same(last, dict(trainer.model.named_parameters()), "the last model")
    else:
        assert Path(str(trainer.state.best_model_checkpoint)).name == "checkpoint-4"
    for step in (32, 40) if contradicted else ():
        again, _ = make(tmp_path, trusted=trusted, compute_metrics=Falling(), **BEST)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.best_model_checkpoint is None
        assert_same(last, dict(again.model.named_parameters()), f"resumed at {step}")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@SAYS
@pytest.mark.parametrize(("strategy", "ours_first"), [("steps", False), ("epoch", True)])
def test_early_stopping_does_not_cut_the_trusted_rows(strategy: str, ours_first: bool, tmp_path: Path) -> None:
    """The metric falls from the start: its patience ends among the trusted rows, in which validation has no say."""
    stop, handed = EarlyStoppingCallback(8 if strategy == "steps" else 3), Handed()
    also, first = ((stop, handed), ()) if ours_first else ((handed,), (stop,))
    options = BEST | {"eval_strategy": strategy, "save_strategy": strategy}
    _, quality = ran(tmp_path, *also, first=first, compute_metrics=Falling(), **options)
    assert_order(handed.steps, quality, 40)
    assert sum("since such rows would stop it" in note for note in quality.notes) == 1


@SAYS
@pytest.mark.parametrize(
    ("strategy", "ours_first", "trusted"),
    [("steps", False, CONTRARY), ("epoch", True, CONTRARY), ("steps", True, TRUSTED)],
    ids=["contradicted by steps", "by epochs", "not"],
)
@pytest.mark.filterwarnings("ignore:training ended at step:UserWarning")
def test_early_stopping_before_the_question_asks_it(
    strategy: str, ours_first: bool, trusted: Any, tmp_path: Path
) -> None:
    """The run goes on with trusted rows where the pool contradicts them, and then ends; else it ends at once."""
    options = BEST | {"eval_strategy": strategy, "save_strategy": strategy, "trusted": trusted}

    def early() -> tuple[Trainer, tsq.QualityCallback, Handed]:
        stop, handed = EarlyStoppingCallback(3 if strategy == "steps" else 1), Handed()
        also, first = ((stop, handed), ()) if ours_first else ((handed,), (stop,))
        return *make(tmp_path, *also, first=first, compute_metrics=Falling(), **options), handed

    trainer, quality, handed = early()
    trainer.train()
    answer = answer_of(quality)
    at = 16 if strategy == "steps" else 20
    assert answer["step"] == at
    assert answer["contradicted"] == (trusted is CONTRARY)
    if trusted is TRUSTED:
        assert ["name E" in note for note in quality.notes if f"training ended at step {at}" in note] == [False]
        return
    assert trainer.state.global_step == answer["until_step"] == answer["from_step"] - 1 + 12
    assert all(
        (row >= ROWS) == (step >= answer["from_step"] - 1) for step in handed.steps for row in handed.steps[step]
    )
    again, _, rest = early()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert rest.steps == {step: rows for step, rows in handed.steps.items() if step >= at}
    if strategy == "epoch":  # else the whole run began another epoch there, which draws a random number
        assert_same(dict(trainer.model.named_parameters()), dict(again.model.named_parameters()), f"resumed at {at}")


@SAYS
@pytest.mark.parametrize("step", [16, 28])
def test_a_users_own_stop_before_the_trusted_rows_is_kept_and_said(step: int, tmp_path: Path) -> None:
    options = {**BEST, "first": (EarlyStoppingCallback(99),)}
    trainer, quality = make(tmp_path, stops_at(step), compute_metrics=Falling(), **options)
    with pytest.warns(UserWarning, match=f"training ended at step {step}"):
        trainer.train()
    assert trainer.state.global_step == step
    assert "unasked" in answer_of(quality)


@SAYS
def test_a_resumed_run_that_skips_no_rows_ends_with_the_trusted_ones(tmp_path: Path) -> None:
    options = {**EVERY, "save_steps": 4, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    make(tmp_path, **options)[0].train()
    for at in (20, 32):
        trainer, quality = make(tmp_path, handed := Handed(), ignore_data_skip=True, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert list(handed.steps) == list(range(at, 40))
        if answer_of(quality)["contradicted"]:
            first = answer_of(quality)["from_step"] - 1
            assert all((row >= ROWS) == (step >= first) for step, rows in handed.steps.items() for row in rows)


def test_the_control_has_a_head_and_all_trusted_rows_in_each_epoch(tmp_path: Path) -> None:
    begun, handed = list[dict[str, torch.Tensor]](), Handed()
    note = At("step_begin", lambda state, _, more: state.global_step or begun.append(weights(more["model"])))
    make(tmp_path / "selects", note, trusted=None, max_steps=4)[0].train()
    control, quality = make(tmp_path / "control", note, handed, rule={"select": False})
    untouched = {name: p.clone() for name, p in control.model.named_parameters() if "classifier" in name}
    control.train()
    assert_same(begun[0], begun[1], "at step 0")
    assert any(not torch.equal(begun[1].get(name, p), p) for name, p in untouched.items())
    for epoch in range(4):
        rows = [row for step in range(10 * epoch, 10 * epoch + 10) for row in handed.steps[step]]
        assert len(rows) == 80
        assert {*range(ROWS, ROWS + FEW)} <= {*rows}
    assert quality.data.scores is None
    assert [look["head_start"]["replaced"] for look in quality.looks] == [True]
    assert not (tmp_path / "control" / "scores.parquet").exists()


@SAYS
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_trainers_own_loader_keeps_the_order_or_is_refused(
    shuffle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, quality = make(tmp_path, handed := Handed())
    loader = DataLoader(quality.data, batch_size=8, collate_fn=trainer.data_collator, shuffle=shuffle)
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: loader)
    if shuffle:
        with pytest.raises(tsq.SettingsError, match="train_sampling_strategy"):
            trainer.train()
        return
    trainer.train()
    assert_order(handed.steps, quality, 40)
