from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

import tsqlora as tsq
from models import tiny_bert
from slotted import assert_hidden_are_zero
from trainers import Stop, assert_same_weights, learnable, model_to_train, trainer, weights
from tsqlora.adapter.slots import ActivePrefix, find_slots
from tsqlora.ranks.events import RankEvent
from tsqlora.training import rank_callback
from tsqlora.training.rank_callback import _require_visible_backward

ROWS = learnable(56)


def run(folder: Path, callback: tsq.RankCallback, *others: TrainerCallback, **arguments: Any) -> PeftModel:
    """42 steps; the adjustments of an interval of 5 are after 5, 10, 15, 20 and 25."""
    model = model_to_train()
    trainer(model, ROWS, folder, [callback, *others], **arguments).train()
    return model


def shapes() -> dict[str, tuple[int, int]]:
    return {name: slots.shape for name, slots in find_slots(model_to_train()).items()}


def spent_well(event: RankEvent, capacity: int = 6) -> bool:
    """Within the budget, and what is left buys no rank where one may be had."""
    costs = {name: sum(shape) for name, shape in shapes().items()}
    assert event.used == sum(rank * costs[name] for name, rank in event.ranks.items())
    below = [costs[name] for name, rank in event.ranks.items() if rank < min(capacity, *shapes()[name])]
    return event.used <= event.budget and event.budget - event.used < min(below, default=1)


class At(TrainerCallback):
    """Calls a function at some moments, with the state and what the Trainer hands out."""

    def __init__(self, moment: str, act: Any) -> None:
        setattr(self, f"on_{moment}", lambda _args, state, _control, **kwargs: act(state, kwargs))


def test_ranks_move_within_the_budget_and_a_plain_peft_model_is_left(tmp_path: Path) -> None:
    callback = tsq.RankCallback(interval=5, moves=6)
    model = run(tmp_path, callback)
    assert [(event.step, event.reason) for event in callback.events] == [
        (step, "adjustment") for step in (5, 10, 15, 20, 25)
    ]
    assert all(spent_well(event) for event in callback.events)
    assert {event.budget for event in callback.events} == {sum(3 * sum(shape) for shape in shapes().values())}
    first = callback.events[0]
    assert first.moved > 0
    assert len(set(first.ranks.values())) > 1
    assert sum(first.sensitivity.values()) == pytest.approx(1)
    assert callback.final == callback.events[-1].ranks
    assert callback.seconds > 0
    assert not any(isinstance(module, ActivePrefix) for module in model.modules())
    assert_no_hooks(model)
    for name, rank in callback.final.items():
        assert model.get_base_model().get_submodule(name).lora_A["default"].weight.shape[0] == rank
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert(num_labels=2, dtype=torch.float32), str(tmp_path / "adapter"))
    assert_same_weights(weights(loaded), weights(model))


def assert_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks


def test_the_same_run_gives_the_same_ranks_and_weights(tmp_path: Path) -> None:
    callbacks = [tsq.RankCallback(interval=5, moves=6) for _ in range(2)]
    one, two = (run(tmp_path / str(j), callback) for j, callback in enumerate(callbacks))
    assert callbacks[0].events == callbacks[1].events
    assert_same_weights(weights(one), weights(two))


def test_a_callback_may_serve_two_trainings(tmp_path: Path) -> None:
    callback = tsq.RankCallback(interval=5)
    run(tmp_path, callback)
    before = callback.events
    run(tmp_path, callback)
    assert callback.events == before


def test_inactive_slots_stay_zero_while_training(tmp_path: Path) -> None:
    checked: list[int] = []

    def check(state: TrainerState, kwargs: dict[str, Any]) -> None:
        assert_hidden_are_zero(kwargs["model"], kwargs["optimizer"])
        checked.append(state.global_step)

    run(tmp_path, tsq.RankCallback(interval=5, moves=6), At("step_end", check), weight_decay=0.1)
    assert len(checked) == 42


def test_gradient_accumulation_shows_the_probe_all_micro_batches(tmp_path: Path, probes: list[Any]) -> None:
    callback = tsq.RankCallback(interval=2)
    run(tmp_path, callback, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert [probe.sensitivity().samples for probe in probes] == [8] * len(callback.events)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The probes that were opened in training steps."""
    made: list[Any] = []
    real = rank_callback.Probe

    def make(*args: Any) -> Any:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(rank_callback, "Probe", make)
    return made


def test_accumulation_and_one_large_batch_measure_the_same(tmp_path: Path) -> None:
    found: list[dict[str, float]] = []
    for size, accumulation in ((8, 1), (4, 2)):
        callback = tsq.RankCallback(interval=1, warmup=0, freeze=0)
        model = model_to_train(dropout=0.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer(model, ROWS[:8], tmp_path, [callback], **arguments).train()
        found.append(dict(callback.events[0].sensitivity))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_interval_that_does_not_fit_is_told_before_training(tmp_path: Path) -> None:
    model = model_to_train()
    before = weights(model)
    text = r"no adjustment fits into 42 steps with ranks.interval 40, ranks.warmup 0.1 and ranks.freeze 0.3; lower them"
    with pytest.raises(tsq.SettingsError, match=text):
        trainer(model, ROWS, tmp_path, [tsq.RankCallback(interval=40)]).train()
    assert_same_weights(weights(model), before)


def test_bounds_that_cost_more_than_the_budget_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(tsq.SettingsError, match=r"budget .* is below the .* parameters that rank 4 needs in 13 layers"):
        run(tmp_path, tsq.RankCallback(interval=5, min_rank=4))


def test_a_training_that_ends_before_any_adjustment_is_an_error(tmp_path: Path) -> None:
    text = "training ended at step 3 and no rank was ever adjusted: the first adjustment was to be at step 5"
    with pytest.raises(tsq.TsqLoraError, match=text):
        run(tmp_path, tsq.RankCallback(interval=5), Stop(3))


def test_the_interval_is_a_twentieth_of_the_run_and_at_least_ten(tmp_path: Path) -> None:
    callback = tsq.RankCallback()
    run(tmp_path, callback)
    assert [event.step for event in callback.events] == [10, 20]


def test_policy_fixed_never_probes(tmp_path: Path, probes: list[Any]) -> None:
    callback = tsq.RankCallback(interval=5, policy="fixed")
    run(tmp_path, callback)
    assert not probes
    assert not callback.events
    assert set(callback.final.values()) == {3}


def test_a_policy_may_be_a_function_of_ones_own(tmp_path: Path) -> None:
    def swap(ranks: dict[str, int], **_: Any) -> dict[str, int]:
        first, second, *_rest = ranks
        return ranks | {first: ranks[first] - 1, second: ranks[second] + 1}

    callback = tsq.RankCallback(interval=5, warmup=0.2, freeze=0.6, policy=swap)
    run(tmp_path, callback)
    assert sorted(callback.final.values()) == [1, *[3] * 11, 5]


@pytest.mark.parametrize("slotless", [tiny_bert, lambda **kw: tsq.finalize(tsq.wrap(tiny_bert(**kw)))])
def test_a_model_without_slots_is_refused(tmp_path: Path, slotless: Any) -> None:
    with pytest.raises(tsq.UnsupportedError, match=r"no rank slots.*make it with tsqlora\.wrap"):
        trainer(slotless(dtype=torch.float32), ROWS, tmp_path, [tsq.RankCallback(interval=5)]).train()


def test_unknown_names_are_told_at_once() -> None:
    with pytest.raises(tsq.SettingsError, match="ranks.policy 'tsqlorra' is unknown"):
        tsq.RankCallback(policy="tsqlorra")
    with pytest.raises(tsq.SettingsError, match="unknown ranks.estimator 'fischer'"):
        tsq.RankCallback(estimator="fischer")


def test_what_hides_the_backward_pass_is_refused() -> None:
    for hidden, text in (((True, 1), "torch_compile hides the layers"), ((False, 2), "2 GPUs in one process")):
        args: Any = SimpleNamespace(torch_compile=hidden[0], n_gpu=hidden[1])
        with pytest.raises(tsq.UnsupportedError, match=text):
            _require_visible_backward(args)


def test_an_optimizer_that_cannot_be_served_is_refused_at_the_first_step(tmp_path: Path) -> None:
    steps: list[int] = []
    seen = At("step_begin", lambda state, _: steps.append(state.global_step))
    with pytest.raises(tsq.UnsupportedError, match="keeps 'exp_avg_sq_row' .* use AdamW, Adam or SGD"):
        run(tmp_path, tsq.RankCallback(interval=5), seen, optim="adafactor")
    assert steps == [0]


def test_clipping_changes_no_importance(tmp_path: Path) -> None:
    found: list[Tensor] = []
    for norm in (1e-3, 0.0):
        callback = tsq.RankCallback(policy="fixed")
        run(tmp_path, callback, max_grad_norm=norm, max_steps=1)
        found.append(callback.importance.mean)
    assert bool(found[0].any())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-9)


def test_a_step_that_overflowed_puts_the_adjustment_off_and_counts_for_no_slot(tmp_path: Path) -> None:
    """Steps 5 and 6 do, as with a gradient scaler; the Trainer calls the callbacks in this order."""
    kept: dict[str, Tensor] = {}

    def overflow(state: TrainerState, kwargs: dict[str, Any]) -> None:
        if state.global_step in (4, 5):
            grad = next(iter(find_slots(kwargs["model"]).values())).a.grad
            assert grad is not None
            kept["grad"] = grad.clone()
            grad[0, 0] = torch.inf

    def recover(state: TrainerState, kwargs: dict[str, Any]) -> None:
        if state.global_step in (4, 5):
            next(iter(find_slots(kwargs["model"]).values())).a.grad = kept["grad"]

    callback = tsq.RankCallback(interval=5, moves=6)
    callbacks = [At("pre_optimizer_step", overflow), callback, At("pre_optimizer_step", recover)]
    trainer(model_to_train(), ROWS, tmp_path, callbacks).train()
    assert [event.step for event in callback.events] == [7, 10, 15, 20, 25]
    assert callback.events[0].moved > 0
    assert int(callback.importance.age.max()) == 42 - 2


def test_an_overflow_is_not_made_up_for_once_ranks_are_frozen(tmp_path: Path) -> None:
    callback = tsq.RankCallback(interval=5, freeze=0.86)
    poison = At(
        "pre_optimizer_step", lambda state, kwargs: _poison(kwargs["model"]) if state.global_step == 4 else None
    )
    with pytest.raises(tsq.TsqLoraError, match="no rank was ever adjusted"):
        trainer(model_to_train(), ROWS, tmp_path, [poison, callback]).train()


def _poison(model: nn.Module) -> None:
    for slots in find_slots(model).values():
        slots.a.grad = torch.full_like(slots.a, torch.nan)


def test_the_budget_is_what_the_model_was_wrapped_with(tmp_path: Path) -> None:
    callback = tsq.RankCallback(interval=5, moves=6)
    model = model_to_train(mean_rank=2.5, max_rank=4)
    trainer(model, ROWS, tmp_path, [callback]).train()
    assert all(spent_well(event, capacity=4) for event in callback.events)
    assert callback.budget <= 2.5 * sum(sum(shape) for shape in shapes().values())
    assert max(callback.final.values()) <= 4


def test_a_layer_may_lose_its_adapter_where_min_rank_is_zero(tmp_path: Path) -> None:
    def all_but_one(a: Tensor, b: Tensor, layer: Any) -> Tensor:
        return torch.tensor(1.0 if layer.out_features == 32 else 1e-6)

    callback = tsq.RankCallback(interval=3, moves=99, min_rank=0, estimator=all_but_one, freeze=0.05)
    model = run(tmp_path, callback)
    gone = [name for name, rank in callback.final.items() if rank == 0]
    assert gone
    assert all(type(model.get_base_model().get_submodule(name)) is nn.Linear for name in gone)


def test_slots_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    callback = tsq.RankCallback(interval=5, moves=6, finalize=False)
    model = run(tmp_path, callback)
    assert tsq.active_ranks(model) == callback.final
    assert model.peft_config["default"].rank_pattern == callback.final
    run_again = tsq.RankCallback(interval=5)
    trainer(model, ROWS, tmp_path, [run_again]).train()
    assert run_again.budget == callback.events[-1].used


def test_a_step_that_failed_leaves_no_hooks_for_the_next_training(tmp_path: Path) -> None:
    def fail(state: TrainerState, kwargs: dict[str, Any]) -> None:
        if state.global_step == 4:
            raise ZeroDivisionError

    callback, model = tsq.RankCallback(interval=5), model_to_train()
    with pytest.raises(ZeroDivisionError):
        trainer(model, ROWS, tmp_path, [At("pre_optimizer_step", fail), callback]).train()
    trainer(model, ROWS, tmp_path, [callback]).train()
    assert len(callback.events) == 5
    assert_no_hooks(model)


def test_checkpoints_on_the_way_load_with_plain_peft(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    keep = At("save", lambda state, kwargs: seen.update({state.global_step: weights(kwargs["model"])}))
    run(tmp_path, tsq.RankCallback(interval=5, moves=6), keep, save_strategy="steps", save_steps=12)
    assert sorted(seen) == [12, 24, 36, 42]
    for step, wanted in seen.items():
        base = tiny_bert(num_labels=2, dtype=torch.float32)
        assert_same_weights(weights(PeftModel.from_pretrained(base, str(tmp_path / f"checkpoint-{step}"))), wanted)


def test_the_best_checkpoint_brings_its_ranks(tmp_path: Path) -> None:
    """A learning rate that is far too high: the first checkpoint is the best."""
    callback = tsq.RankCallback(interval=5, moves=6)
    seen: dict[int, dict[str, int]] = {}
    keep = At("save", lambda state, kwargs: seen.update({state.global_step: tsq.active_ranks(kwargs["model"])}))
    arguments = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    model = model_to_train()
    made = trainer(model, ROWS, tmp_path, [callback, keep], **arguments, learning_rate=0.5, save_total_limit=1)
    made.train()
    best = made.state.best_global_step
    assert best is not None
    assert best < 28
    assert callback.final == seen[best]
    assert callback.final != callback.events[-1].ranks
    state = PeftModel.from_pretrained(
        tiny_bert(num_labels=2, dtype=torch.float32), str(tmp_path / f"checkpoint-{best}")
    )
    assert_same_weights(weights(model), weights(state))


# --- with quality sampling ----------------------------------------------------------------


@pytest.mark.parametrize("ranks_first", [True, False])
def test_the_first_ranks_come_from_the_quality_sample_once_there_is_one(tmp_path: Path, ranks_first: bool) -> None:
    data = tsq.QualitySubset(ROWS, fraction=0.5)
    ranks = tsq.RankCallback(interval=3, moves=6, freeze=0.2)
    callbacks: list[TrainerCallback] = [quality(data), ranks]
    trainer(model_to_train(), data, tmp_path, callbacks[:: -1 if ranks_first else 1], num_train_epochs=8).train()
    # Four steps an epoch, two epochs of warm-up.
    assert [(event.step, event.reason) for event in ranks.events][:3] == [
        (8, "start"),
        (9, "adjustment"),
        (12, "adjustment"),
    ]
    start = ranks.events[0]
    assert start.ranks == start.target
    assert start.moved > 0
    assert all(spent_well(event) for event in ranks.events)
    assert ranks.started


def test_policy_fixed_keeps_the_ranks_of_the_start(tmp_path: Path, probes: list[Any]) -> None:
    data = tsq.QualitySubset(ROWS, fraction=0.5)
    ranks = tsq.RankCallback(policy="fixed")
    trainer(model_to_train(), data, tmp_path, [quality(data), ranks], num_train_epochs=4).train()
    assert [event.reason for event in ranks.events] == ["start"]
    assert ranks.final == ranks.events[0].ranks
    assert not probes
