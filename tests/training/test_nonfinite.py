"""A step that is not finite teaches nothing: it is skipped and counted."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import Trainer, TrainerCallback

import tsqlora as tsq
from scoring import drawing
from stock import At, Poison, fails_at, make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.training import nonfinite
from tsqlora.training.nonfinite import NAMED, FiniteSteps

ROWS = moods(40)


class Watch(TrainerCallback):
    """Weights, moments and learning rates after each step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.moments: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights.append([p.detach().clone() for p in parameters])
        self.moments.append([optimizer.state[p]["exp_avg"].clone() for p in parameters if p in optimizer.state])
        self.rates.append(optimizer.param_groups[0]["lr"])


def trainer(
    folder: Path, *callbacks: TrainerCallback, first: tuple[TrainerCallback, ...] = (), **further: Any
) -> tuple[Trainer, FiniteSteps]:
    """Four epochs of five steps."""
    options = {"learning_rate": 0.02, "num_train_epochs": 4} | further
    quality = drawing(data := tsq.QualitySubset(ROWS, 1.0, seed=0))
    return make_trainer(slotted_bert(), data, folder, [*first, quality, *callbacks], **options), quality.finite


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three such steps of six end a training."""
    monkeypatch.setattr(nonfinite, "LIMIT", 3)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("what", "value", "clipping"),
    [("loss", torch.nan, 0.0), ("loss", -torch.inf, 1.0), ("lora_A", 0.0, 1.0), ("classifier", 0.0, 0.0)],
)
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(
    what: str, value: float, clipping: float, tmp_path: Path
) -> None:
    watch = Watch()
    made, steps = trainer(tmp_path, Poison(6, what=what, value=value), watch, max_grad_norm=clipping)
    made.train()
    assert steps.skipped == [6]
    for seen in (watch.weights, watch.moments):
        assert equal(seen[4], seen[5])
        assert not equal(seen[5], seen[6])
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())
    assert watch.rates == sorted(set(watch.rates), reverse=True), "the schedule goes on"
    assert made.state.global_step == 20
    assert not made.model._forward_hooks


@pytest.mark.parametrize(
    ("what", "value", "clipping", "steps"),
    [
        ("loss", torch.nan, 1.0, (1, 4, 5)),
        ("lora_A", 0.0, 0.0, (4,)),
        ("classifier", 0.0, 0.0, (1, 4, 5)),
    ],
)
def test_no_importance_learns_of_it_and_an_adjustment_waits(
    what: str, value: float, clipping: float, steps: tuple[int, ...], tmp_path: Path
) -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    def keep(state: Any, *_: Any) -> None:
        assert ranks.loop is not None
        seen[state.global_step] = {name: table.clone() for name, table in ranks.loop.importance.tables().items()}

    ranks = paper.RankCallback(interval=4, schedule=paper.RankSchedule(moves=6))
    poison, tables = Poison(*steps, what=what, value=value), At("step_end", keep)
    # Either order of the two; tables are looked at before an adjustment changes them.
    first, also = ((), (tables, poison, ranks)) if clipping else ((tables, ranks), (poison,))
    trainer(tmp_path, *also, first=first, max_grad_norm=clipping, num_train_epochs=6)[0].train()
    assert all(table.isfinite().all() for table in seen[20].values())
    for step in steps:
        before = seen[step - 1] if step > 1 else {name: torch.zeros_like(t) for name, t in seen[1].items()}
        assert all(torch.equal(before[name], seen[step][name]) for name in before)
    first = {(4,): 5, (1, 4, 5): 6}[steps]
    assert [event.step for event in ranks.events][:2] == [first, 8]


@pytest.mark.usefixtures("three")
def test_too_many_end_the_training_with_advice_and_undamaged_weights(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    made, _ = trainer(tmp_path, Poison(11, 12, 14), **saves)
    match = rf"^3 of the last 4 steps .* at step 14;.* is {tmp_path}/checkpoint-8\."
    with pytest.raises(tsq.TsqLoraError, match=match):
        made.train()
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())


def test_a_training_that_failed_leaves_nothing_on_the_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, fails_at("step_end", 1))[0]
    with pytest.raises(ZeroDivisionError):
        made.train()
    made.pop_callback(tsq.QualityCallback)
    gc.collect()
    assert not made.model._forward_hooks


@pytest.mark.usefixtures("three")
def test_few_among_many_do_not_end_it(tmp_path: Path) -> None:
    made, steps = trainer(tmp_path, Poison(3, 4, 9, 10, 15, 16))
    made.train()
    assert steps.skipped == [3, 4, 9, 10, 15, 16]


def test_a_base_that_was_never_finite_is_told_so(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path)
    with torch.no_grad():
        made.model.get_base_model().bert.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(tsq.TsqLoraError, match=r"no step before had a finite one: the base model's weights are not"):
        made.train()
    assert made.state.global_step == 4


@pytest.mark.usefixtures("three")
def test_a_resumed_run_knows_what_was_skipped(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, Poison(5), **saves, max_steps=5)[0].train()
    again, rest = trainer(tmp_path, Poison(8), **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rest.summary() == {"count": 2, "steps": [{"step": 5}, {"step": 8}]}
    # One from before the resume counts towards the limit.
    with pytest.raises(tsq.TsqLoraError, match=r"^3 of the last 3 steps"):
        trainer(tmp_path, Poison(6, 7), **saves)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_record_stays_short() -> None:
    steps = FiniteSteps()
    assert (steps.summary(), steps.in_words()) == ({}, [])
    steps.skipped = [*range(3, 3 * NAMED, 2)]
    assert (steps.summary()["count"], len(steps.summary()["steps"])) == (len(steps.skipped), NAMED)
    assert steps.in_words() == [
        f"{len(steps.skipped)} steps were skipped whose loss or gradient was not finite: step 3, 5, 7, ..."
    ]


@pytest.mark.parametrize(("scale", "counted"), [(65536.0, 0), (0.5, 1)])
def test_a_scaler_that_looks_for_its_scale_is_left_to_it(
    scale: float, counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, steps = trainer(tmp_path, Poison(4), num_train_epochs=1)
    step = AcceleratedOptimizer.step

    def without_scaler(self: Any, closure: Any = None) -> None:
        retained, self.scaler = self.scaler, None
        step(self, closure)
        self.scaler = retained

    monkeypatch.setattr(AcceleratedOptimizer, "step", without_scaler)

    scaler = SimpleNamespace(get_scale=lambda: scale)
    made.add_callback(At("train_begin", lambda _, __, further: setattr(further["optimizer"], "scaler", scaler)))
    made.train()
    assert len(steps.skipped) == counted
