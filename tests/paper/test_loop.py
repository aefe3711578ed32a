from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from torch import nn

import tsqlora as tsq
from loops import PERIOD, ROWS, STEPS, adamw, batch, begin, certain, one_step, several_steps, weights, whole_run
from models import collate
from scoring import assert_same
from slotted import assert_hidden_are_zero, trained
from stock import base_bert, make_trainer, slotted_bert
from synchronisations import waits_of_ours
from tsqlora import paper
from tsqlora.errors import UnsupportedError
from tsqlora.paper import loop as mover
from tsqlora.paper.slots import find_slots, has_slots


def test_a_loop_of_ones_own_does_what_the_trainer_does(tmp_path: Path) -> None:
    callback, model = paper.RankCallback(**PERIOD), certain(slotted_bert())
    options = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch"}
    make_trainer(model, ROWS, tmp_path, [callback], **options).train()
    ranks = whole_run()
    finished = ranks.finish()
    assert [event.step for event in ranks.events] == [4, 8, 12, 16, 20]
    assert ranks.events == callback.events
    assert ranks.final == callback.final
    assert_same(weights(model), weights(finished), "weights")


def test_hidden_slots_are_zero_and_the_budget_holds_at_every_step() -> None:
    def check(ranks: paper.RankLoop) -> None:
        assert_hidden_are_zero(ranks.model, ranks.optimizer)
        used = sum(rank * sum(ranks.shapes[name]) for name, rank in ranks.ranks.items())
        assert used <= ranks.budget == 4 * sum(map(sum, ranks.shapes.values()))

    ranks = whole_run(also=check)
    assert sum(event.moved for event in ranks.events) > 0


@pytest.mark.parametrize("again", [False, True])
def test_a_step_of_several_forward_passes_is_measured_whole(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = mover.Probe
    monkeypatch.setattr(mover, "Probe", lambda *args: made.append(real(*args)) or made[-1])
    ranks = whole_run(parts=4, again=again)
    assert [probe.sensitivity().samples for probe in made] == [8] * 6  # the first for nothing, in step 1
    shares, expected = (dict(loop.events[0].sensitivity) for loop in (ranks, whole_run()))
    assert shares == pytest.approx(expected, rel=1e-4)


def test_clipping_in_half_precision_ranks_move() -> None:
    ranks = begin()
    for step in range(STEPS):
        ranks.before_forward()
        with torch.autocast("cpu", torch.bfloat16):
            loss = ranks.model(**batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(ranks.model), 0.1)
        ranks.before_optimizer_step()
        ranks.optimizer.step()
        ranks.optimizer.zero_grad()  # before or after, that is the same
        ranks.after_optimizer_step()
        assert_hidden_are_zero(ranks.model, ranks.optimizer)
    ranks.finish()
    assert sum(event.moved for event in ranks.events) > 0


def scaled_run(*broken: int, unscaled: bool = False) -> paper.RankLoop:
    """A run with a gradient scaler, which skips the steps that are broken."""
    ranks, scaler = begin(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        ranks.before_forward()
        scaler.scale(ranks.model(**batch(step)).loss).backward()
        if step in broken:
            next(iter(ranks.layers.values())).b.grad[0, 0] = torch.inf  # type: ignore[index]
        if unscaled:
            scaler.unscale_(ranks.optimizer)
        ranks.before_optimizer_step()
        before = weights(ranks.model)
        scaler.step(ranks.optimizer)
        if step in broken:
            assert_same(before, weights(ranks.model), "skipped")
        scaler.update()
        ranks.after_optimizer_step()
        ranks.optimizer.zero_grad()
    return ranks


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_that_a_gradient_scaler_skips_postpones_the_adjustment(unscaled: bool) -> None:
    ranks = scaled_run(3, 4, unscaled=unscaled)
    assert [event.step for event in ranks.events] == [6, 8, 12, 16, 20]
    assert int(ranks.importance.age.max()) == ranks.steps.stop - 2
    ranks.finish()


def test_an_adjustment_postponed_until_ranks_are_frozen_is_left_out() -> None:
    assert [event.step for event in scaled_run(19).events] == [4, 8, 12, 16]


def test_a_gradient_scaler_changes_no_rank() -> None:
    assert [event.ranks for event in scaled_run().events] == [event.ranks for event in whole_run().events]


def test_accelerate_accumulates_as_a_plain_loop_does() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    made = certain(slotted_bert())
    model, optimizer = accelerator.prepare(made, adamw(made))
    ranks = paper.RankLoop(model, optimizer, STEPS, **PERIOD)
    for step in range(STEPS):
        for part in range(2):
            with accelerator.accumulate(model):
                ranks.before_forward()
                accelerator.backward(model(**batch(step, part, 2)).loss)
                if accelerator.sync_gradients:
                    ranks.before_optimizer_step()
                optimizer.step()
                if accelerator.sync_gradients:
                    ranks.after_optimizer_step()
                optimizer.zero_grad()
    plain = whole_run(parts=2)
    assert ranks.events == plain.events
    assert_same(weights(ranks.finish()), weights(plain.finish()), "weights")


def test_the_first_ranks_may_come_from_a_sample() -> None:
    ranks = begin()
    ranks.start(ROWS[:16], collate, batch_size=8)
    measured = paper.sensitivity(begin().model, ROWS[:16], collate, batch_size=8)
    assert ranks.ranks == paper.allocate(measured, mean_rank=4, max_rank=8)
    assert [(event.step, event.reason) for event in ranks.events] == [(0, "start")]
    several_steps(ranks, range(STEPS))
    assert [event.step for event in ranks.events] == [0, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("first", [True, False])
def test_finishing_twice_gives_the_same_model(first: bool) -> None:
    ranks = whole_run()
    final = ranks.ranks
    model = ranks.finish(finalize_model=first)
    assert has_slots(model) != first
    if not first:
        assert paper.active_ranks(model) == ranks.ranks
        further = paper.RankLoop(model, ranks.optimizer, STEPS)
        assert further.budget == ranks.events[-1].used
        further.close()
    retained = weights(model)
    for _ in range(2):
        assert ranks.finish() is model
        assert not has_slots(model)
        assert_same(retained, weights(model), "weights")
        assert ranks.final == final


def test_what_the_optimizer_keeps_of_active_slots_stays_when_the_model_is_plain() -> None:
    ranks = whole_run()
    parts = [(p, dim, slots.rank) for slots in ranks.layers.values() for p, dim in slots.matrices()]
    before = [dict(ranks.optimizer.state[p]) for p, _, _ in parts]
    ranks.finish()
    for (parameter, dim, rank), state in zip(parts, before, strict=True):
        after = ranks.optimizer.state[parameter]
        assert after.keys() == state.keys()
        assert parameter.shape[dim] == rank
        for name, value in state.items():
            assert torch.equal(after[name], value.narrow(dim, 0, rank) if value.dim() else value)


def test_the_first_adjustment_moves_ranks_also_after_a_skipped_step() -> None:
    """A step that is not finite ages no slot, and there is none then that is an interval old."""
    ranks = begin()
    for step in range(4):
        one_step(ranks, step, factor=torch.nan if step == 1 else 1)
    assert [event.step for event in ranks.events] == [4]
    assert ranks.events[0].moved > 0


@pytest.mark.parametrize("call", [paper.RankLoop.before_forward, lambda ranks: ranks.start(ROWS, collate)])
def test_a_finished_loop_does_not_go_on(call: Callable[[paper.RankLoop], None]) -> None:
    ranks = whole_run()
    ranks.finish(finalize_model=False)
    with pytest.raises(tsq.TsqLoraError, match="the run was finished at step 30"):
        call(ranks)


def test_a_step_may_leave_ranks_alone() -> None:
    ranks = begin()
    for step in range(STEPS):
        ranks.before_forward(adjust=step > 10)
        one_step(ranks, step)
    assert [event.step for event in ranks.events] == [12, 16, 20]


# --- what it saves ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 4, 7, 13, 25])
def test_a_run_resumed_from_ones_own_checkpoint_ends_bit_equal(at: int, tmp_path: Path) -> None:
    first = begin()
    several_steps(first, range(at))
    states = [part.state_dict() for part in (first.model, first.optimizer, first)]
    torch.save(states, tmp_path / "checkpoint.pt")
    first.close()
    second = begin()
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part, state in zip((second.model, second.optimizer, second), loaded, strict=True):
        part.load_state_dict(state)
    several_steps(second, range(at, STEPS))
    whole = whole_run()
    assert second.events == whole.events
    assert_same(whole.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"], "moments")
    assert_same(weights(whole.finish()), weights(second.finish()), "weights")


def test_a_postponed_adjustment_comes_after_a_resume_too() -> None:
    first, second = begin(), begin()
    several_steps(first, range(3))
    one_step(first, 3, factor=torch.inf)
    for one, other in ((first.model, second.model), (first.optimizer, second.optimizer), (first, second)):
        other.load_state_dict(one.state_dict())
    one_step(second, 4)
    assert [event.step for event in second.events] == [5]


def test_the_state_of_another_run_is_refused() -> None:
    ranks = whole_run()
    with pytest.raises(tsq.SettingsError, match=r"had ranks\.interval 4, and this one has 5"):
        begin(interval=5).load_state_dict(ranks.state_dict())
    with pytest.raises(tsq.SettingsError, match="other ranks than the checkpoint; load the model's state before"):
        begin().load_state_dict(ranks.state_dict())


# --- what it refuses ----------------------------------------------------------------------


@pytest.mark.parametrize("all_of_them", [False, True])
def test_ranks_are_said_to_have_waited_only_where_no_adjustment_was_left(all_of_them: bool) -> None:
    ranks = begin()
    for number in range(ranks.steps[-1] if all_of_them else ranks.steps[0]):
        ranks.before_forward(adjust=False)
        one_step(ranks, number)
    if all_of_them:
        with pytest.warns(UserWarning, match=f"until step {ranks.steps[-1]}, the last"):
            ranks.finish()
    else:
        ranks.finish()
        assert not ranks.notes


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_that_ends_before_any_adjustment_warns(steps: int) -> None:
    ranks = begin()
    several_steps(ranks, range(steps))
    with pytest.warns(UserWarning, match=f"training ended at step {steps}, and the first adjustment was to be at step"):
        ranks.finish()


def test_gradients_that_are_gone_are_told() -> None:
    ranks = begin()
    ranks.before_forward()
    ranks.model(**batch(0)).loss.backward()
    ranks.optimizer.zero_grad()
    with pytest.raises(tsq.UnsupportedError, match="no LoRA weight has a gradient before the optimizer's step"):
        ranks.before_optimizer_step()
    ranks.close()


def test_an_optimizer_made_before_the_slots_is_refused() -> None:
    model = base_bert()
    made = torch.optim.AdamW(model.parameters())
    with pytest.raises(tsq.SettingsError, match=r"the optimizer does not train the adapter of bert.*wrapped later"):
        paper.RankLoop(paper.wrap(model), made, STEPS)


def test_what_cannot_be_measured_is_refused_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = begin(schedule=paper.RankSchedule(moves=6, warmup=0.5))
    with monkeypatch.context() as patch:
        patch.setattr("tsqlora.paper.capture.seen", mock.Mock(side_effect=UnsupportedError("no")))
        with pytest.raises(UnsupportedError, match="no"):
            one_step(ranks, 0)
    ranks.close()
    assert not any(module._forward_hooks for module in ranks.model.modules())


def test_measuring_the_first_step_for_nothing_changes_no_bit() -> None:
    measured, unmeasured = whole_run(), begin()
    unmeasured.before_forward()
    unmeasured._tap.close()
    unmeasured._probe, unmeasured._rehearsal = None, False
    several_steps(unmeasured, range(STEPS))
    assert measured.events == unmeasured.events
    assert_same(weights(measured.finish()), weights(unmeasured.finish()), "weights")


def test_the_model_is_found_in_what_wraps_it() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = certain(slotted_bert())
        parallel = nn.parallel.DistributedDataParallel(model)
        ranks = paper.RankLoop(parallel, adamw(model), STEPS, **PERIOD)
        assert ranks.model is model
        several_steps(ranks, range(STEPS), model=parallel)
        assert ranks.events == whole_run().events
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("side", [0, 1])
def test_a_layer_whose_adapter_is_frozen_is_refused(side: int) -> None:
    model = slotted_bert()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    name, slots = next(iter(find_slots(model).items()))
    slots.matrices()[side][0].requires_grad_(False)
    with pytest.raises(tsq.UnsupportedError, match=f"the adapter of {name} is frozen"):
        paper.RankLoop(model, optimizer, total_steps=40, interval=4)


def test_only_measured_steps_wait_for_the_device() -> None:
    ranks, waits = begin(schedule=paper.RankSchedule(warmup=0, freeze=0)), dict[int, int]()
    for step in range(1, 10):
        with waits_of_ours() as places:
            one_step(ranks, step)
        waits[step] = len(places)
    assert [step for step, count in waits.items() if count] == [1, 4, 8]
