"""A step that is not finite teaches nothing: it is skipped, counted, and its rows are named."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import tsqlora as tsq
from stock import make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.training.nonfinite import GUARD_FILE, NAMED

ROWS = moods(40)
STRANGE = 39
"""A token that no row has but the broken ones."""


class Poison(TrainerCallback):
    """In some steps, counted from 1, or for rows with the strange token, makes a loss or gradient not finite."""

    def __init__(self, *steps: int, what: str = "loss", value: float = torch.nan) -> None:
        self.steps, self.what, self.value, self.step = steps, what, value, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook = kwargs["model"].register_forward_hook(self._forward, with_kwargs=True, prepend=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()

    def _forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        broken = self.step in self.steps or bool((kwargs["input_ids"] == STRANGE).any())
        if not (module.training and broken):
            return
        if self.what == "loss":
            output["loss"] = output["loss"] + self.value  # its gradient alone would be finite
        else:
            weight = next(p for name, p in module.named_parameters() if self.what in name and p.requires_grad)
            output["loss"] = output["loss"] + (weight * 0.0).sum().sqrt()  # 0, of infinite slope


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


def trainer(folder: Path, *callbacks: TrainerCallback, data: Any = None, **further: Any) -> Trainer:
    """Four epochs of five steps."""
    options = {"learning_rate": 0.02, "num_train_epochs": 4} | further
    return make_trainer(
        slotted_bert(), data or tsq.QualitySubset(ROWS, 1.0, seed=0), folder, list(callbacks), **options
    )


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


KINDS = pytest.mark.parametrize(
    ("what", "value"), [("loss", torch.nan), ("loss", -torch.inf), ("lora_A", 0.0), ("classifier", 0.0)]
)


@KINDS
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(
    what: str, value: float, clipping: float, tmp_path: Path
) -> None:
    guard, watch = tsq.GuardCallback(), Watch()
    made = trainer(tmp_path, guard, Poison(6, what=what, value=value), watch, max_grad_norm=clipping)
    made.train()
    assert (guard.count, [step.step for step in guard.skipped]) == (1, [6])
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
        ("loss", torch.nan, 0.0, (1,)),
        ("loss", -torch.inf, 1.0, (4,)),
        ("loss", torch.nan, 1.0, (1, 4, 5)),
        ("lora_A", 0.0, 0.0, (4,)),
        ("lora_A", 0.0, 1.0, (1, 4, 5)),
        ("classifier", 0.0, 1.0, (1,)),
        ("classifier", 0.0, 0.0, (1, 4, 5)),
    ],
)
def test_no_importance_learns_of_it_and_an_adjustment_waits(
    what: str, value: float, clipping: float, steps: tuple[int, ...], tmp_path: Path
) -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    class Tables(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert ranks.loop is not None
            tables = ranks.loop.importance.tables()
            seen[state.global_step] = {name: table.clone() for name, table in tables.items()}

    ranks = paper.RankCallback(interval=4, schedule=paper.RankSchedule(moves=6))
    callbacks = (Tables(), Poison(*steps, what=what, value=value), tsq.GuardCallback(limit=9))
    # Either order of the two; tables are looked at before an adjustment changes them.
    order = (*callbacks, ranks) if clipping else (callbacks[0], ranks, *callbacks[1:])
    trainer(tmp_path, *order, max_grad_norm=clipping, num_train_epochs=6).train()
    assert all(table.isfinite().all() for table in seen[20].values())
    for step in steps:
        before = seen[step - 1] if step > 1 else {name: torch.zeros_like(t) for name, t in seen[1].items()}
        assert all(torch.equal(before[name], seen[step][name]) for name in before)
    first = {(1,): 4, (4,): 5, (1, 4, 5): 6}[steps]
    assert [event.step for event in ranks.events][:2] == [first, 8]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_rows_of_a_skipped_step_are_named(accumulation: int, tmp_path: Path) -> None:
    """In the order in which the Trainer shuffles them."""
    broken = [row | {"input_ids": [STRANGE, *row["input_ids"][1:]]} if j == 21 else row for j, row in enumerate(ROWS)]
    data = tsq.QualitySubset(broken, 1.0, seed=0)
    guard = tsq.GuardCallback(data, limit=9)
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    options = {"train_sampling_strategy": "random", "eval_strategy": "steps", "eval_steps": 2}
    trainer(tmp_path, Poison(), guard, data=data, evaluate_on=ROWS[:9], **options, **sizes).train()
    assert guard.count == 4, "one an epoch"
    for step in guard.skipped:
        assert step.rows is not None
        assert 21 in step.rows
        assert len(set(step.rows)) == 8


def test_rows_are_named_by_their_places_in_the_file_where_those_are_known(tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, 1.0, seed=0)
    guards = [tsq.GuardCallback(data, ids=ids) for ids in (None, np.arange(100, 140))]
    for guard in guards:
        trainer(tmp_path, Poison(2), guard, data=data, num_train_epochs=1).train()
    before, after = (guard.skipped[0].rows or [] for guard in guards)
    assert [row - 100 for row in after] == before != []


@pytest.mark.parametrize("how", ["no subset given", "workers", "compiled"])
def test_rows_that_cannot_be_known_are_said_to_be_so(how: str, tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, 1.0, seed=0)
    guard = tsq.GuardCallback(None if how == "no subset given" else data)
    options = {"dataloader_num_workers": 1} if how == "workers" else {}
    made = trainer(tmp_path, Poison(6, what="lora_A"), guard, data=data, num_train_epochs=2, **options)
    if how == "compiled":
        made.args.torch_compile = True  # the flag alone: what it asks is tested elsewhere
    made.train()
    assert [(step.step, step.rows) for step in guard.skipped] == [(6, None)]
    assert guard.summary()["notes"] == [
        "1 steps were skipped whose loss or gradient was not finite: step 6 (its rows are unknown)"
    ]


def test_too_many_end_the_training_with_advice_and_undamaged_weights(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        Poison(11, 12, 14),
        tsq.GuardCallback(limit=3),
        save_strategy="steps",
        save_steps=4,
        lr_scheduler_type="constant",
    )
    match = rf"^3 of the last 4 steps .* at step 14 .* is {tmp_path}/checkpoint-8\."
    with pytest.raises(tsq.TsqLoraError, match=match):
        made.train()
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())


def test_a_training_that_failed_leaves_nothing_on_model_and_data(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    data = tsq.QualitySubset(ROWS, 1.0, seed=0)
    made = trainer(tmp_path, tsq.GuardCallback(data), Fail(), data=data)
    with pytest.raises(ZeroDivisionError):
        made.train()
    made.pop_callback(tsq.GuardCallback)
    gc.collect()
    assert not made.model._forward_hooks
    assert not data._listeners


def test_few_among_many_do_not_end_it(tmp_path: Path) -> None:
    guard = tsq.GuardCallback(limit=3)
    trainer(tmp_path, Poison(3, 4, 9, 10, 15, 16), guard).train()
    assert guard.count == 6


def test_a_base_that_was_never_finite_is_told_so(tmp_path: Path) -> None:
    made = trainer(tmp_path, tsq.GuardCallback())
    with torch.no_grad():
        made.model.get_base_model().bert.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(tsq.TsqLoraError, match=r"no step before had a finite one: the base model's weights are not"):
        made.train()
    assert made.state.global_step == 4


def test_a_resumed_run_knows_what_was_skipped(tmp_path: Path) -> None:
    guards = [tsq.GuardCallback(limit=3) for _ in range(2)]
    saves = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path, Poison(5, 8), guards[0], **saves)
    whole.train()
    adapter = (tmp_path / "checkpoint-20" / "adapter_model.safetensors").read_bytes()
    trainer(tmp_path, Poison(5, 8), guards[1], **saves).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert (tmp_path / "checkpoint-20" / "adapter_model.safetensors").read_bytes() == adapter
    assert guards[0].summary() == guards[1].summary()
    assert [step["step"] for step in guards[0].summary()["skipped"]["steps"]] == [5, 8]
    # One from before the resume counts towards the limit.
    with pytest.raises(tsq.TsqLoraError, match=r"^3 of the last 3 steps"):
        trainer(tmp_path, Poison(6, 7), tsq.GuardCallback(limit=3), **saves).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-5")
        )


def test_a_run_begun_without_a_guard_goes_on_with_one(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 5}
    ranks = {"interval": 4, "schedule": paper.RankSchedule(freeze=0.2)}

    def begun(*further: TrainerCallback) -> Trainer:
        data = tsq.QualitySubset(ROWS, 1.0, seed=0)
        both = tsq.QualityCallback(data), paper.RankCallback(**ranks)
        return trainer(tmp_path, *both, *further, data=data, **saves)

    begun().train()
    assert not (tmp_path / "checkpoint-10" / GUARD_FILE).exists()
    guard = tsq.GuardCallback()
    begun(guard, Poison(12)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert guard.count == 1
    saved = json.loads((tmp_path / "checkpoint-20" / GUARD_FILE).read_text())
    assert saved["skipped"] == [{"step": 12, "rows": None}]


def test_a_record_stays_short(tmp_path: Path) -> None:
    guard = tsq.GuardCallback()
    args = SimpleNamespace(output_dir=tmp_path, learning_rate=1.0)
    for step in range(0, 3 * NAMED, 3):
        guard._skip(args, SimpleNamespace(global_step=step))  # type: ignore[arg-type]
    guard._skip(args, SimpleNamespace(global_step=9999))  # type: ignore[arg-type]
    assert guard.count == NAMED + 1
    assert len(guard.summary()["skipped"]["steps"]) == NAMED
    assert len(guard.summary()["notes"][0]) < 200


@pytest.mark.parametrize(("scale", "counted"), [(65536.0, 0), (0.5, 1)])
def test_a_scaler_that_looks_for_its_scale_is_left_to_it(
    scale: float, counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = tsq.GuardCallback()
    made = trainer(tmp_path, Poison(4), guard, num_train_epochs=1)
    step = AcceleratedOptimizer.step

    def without_scaler(self: Any, closure: Any = None) -> None:
        retained, self.scaler = self.scaler, None
        step(self, closure)
        self.scaler = retained

    monkeypatch.setattr(AcceleratedOptimizer, "step", without_scaler)

    class Scaled(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].scaler = SimpleNamespace(get_scale=lambda: scale)

    made.add_callback(Scaled())
    made.train()
    assert guard.count == counted


def test_a_limit_of_none_is_refused() -> None:
    with pytest.raises(tsq.SettingsError, match="limit is 0; it must be at least 1"):
        tsq.GuardCallback(limit=0)
