from collections.abc import Callable
from contextlib import nullcontext
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
from slotted import assert_hidden_are_zero
from stock import base_bert, make_trainer, slotted_bert
from synchronisations import waits_of_ours
from tsqlora import paper
from tsqlora.errors import UnsupportedError
from tsqlora.paper import loop as mover
from tsqlora.paper.slots import find_slots, has_slots


@pytest.fixture(scope="module")
def whole() -> paper.RankLoop:
    """A run that has finished."""

    def check(ranks: paper.RankLoop) -> None:
        assert_hidden_are_zero(ranks.model, ranks.optimizer)
        used = sum(rank * sum(ranks.shapes[name]) for name, rank in ranks.ranks.items())
        assert used <= ranks.budget == 4 * sum(map(sum, ranks.shapes.values()))

    ranks = whole_run(also=check)
    assert sum(event.moved for event in ranks.events) > 0
    ranks.finish()
    return ranks


def assert_same_run(one: paper.RankLoop, other: paper.RankLoop) -> None:
    assert one.events == other.events
    assert_same(weights(one.finish()), weights(other.finish()), "weights")
    assert_same(one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"], "moments")


def test_a_loop_of_ones_own_does_what_the_trainer_does(whole: paper.RankLoop, tmp_path: Path) -> None:
    callback, model = paper.RankCallback(**PERIOD), certain(slotted_bert())
    options = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch"}
    make_trainer(model, ROWS, tmp_path, [callback], **options).train()
    assert [event.step for event in whole.events] == [4, 8, 12, 16, 20]
    assert whole.events == callback.events
    assert whole.final == callback.final
    assert_same(weights(model), weights(whole.model), "weights")


@pytest.mark.parametrize("again", [False, True])
def test_a_step_of_several_forward_passes_is_measured_whole(
    again: bool, whole: paper.RankLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = mover.Probe
    monkeypatch.setattr(mover, "Probe", lambda *args: made.append(real(*args)) or made[-1])
    ranks = begin()
    several_steps(ranks, range(4), parts=4, again=again)
    assert [probe.sensitivity().samples for probe in made] == [8, 8]  # the first for nothing, in step 1
    shares, expected = (dict(loop.events[0].sensitivity) for loop in (ranks, whole))
    assert shares == pytest.approx(expected, rel=1e-4)
    ranks.close()


@pytest.mark.parametrize("unscaled", [False, True])
def test_steps_that_a_gradient_scaler_skips_postpone_the_adjustment_at_most_until_ranks_are_frozen(
    unscaled: bool,
) -> None:
    ranks, scaler = begin(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    broken = (3, 4, 19)
    for step in range(22):
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
    assert [event.step for event in ranks.events] == [6, 8, 12, 16]
    assert int(ranks.importance.age.max()) == ranks.steps.stop - len(broken)
    ranks.finish()


def test_accelerate_accumulates_as_a_plain_loop_does() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    made = certain(slotted_bert())
    model, optimizer = accelerator.prepare(made, adamw(made))
    ranks, plain = paper.RankLoop(model, optimizer, STEPS, **PERIOD), begin()
    for step in range(10):
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
    several_steps(plain, range(10), parts=2)
    assert len(plain.events) == 2
    assert_same_run(ranks, plain)


def test_the_first_ranks_may_come_from_a_sample() -> None:
    ranks = begin()
    ranks.start(ROWS[:16], collate, batch_size=8)
    measured = paper.sensitivity(begin().model, ROWS[:16], collate, batch_size=8)
    assert ranks.ranks == paper.allocate(measured, mean_rank=4, max_rank=8)
    several_steps(ranks, range(4))
    assert [(event.step, event.reason) for event in ranks.events] == [(0, "start"), (4, "adjustment")]


@pytest.mark.parametrize("first", [True, False])
def test_finishing_twice_gives_the_same_model_and_the_optimizer_keeps_what_it_had_of_active_slots(first: bool) -> None:
    ranks = whole_run()
    parts = [(p, dim, slots.rank) for slots in ranks.layers.values() for p, dim in slots.matrices()]
    before = [dict(ranks.optimizer.state[p]) for p, _, _ in parts]
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
def test_a_finished_loop_does_not_go_on(call: Callable[[paper.RankLoop], None], whole: paper.RankLoop) -> None:
    with pytest.raises(tsq.TsqLoraError, match="the run was finished at step 30"):
        call(whole)


# --- what it saves ------------------------------------------------------------------------


def test_a_run_resumed_from_ones_own_checkpoint_ends_bit_equal(whole: paper.RankLoop, tmp_path: Path) -> None:
    """Before an adjustment, after several, and behind the last one."""
    first = begin()
    for at in (3, 12, 25):
        several_steps(first, range(first.step, at))
        torch.save([part.state_dict() for part in (first.model, first.optimizer, first)], tmp_path / "checkpoint.pt")
        second = begin()
        loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for part, state in zip((second.model, second.optimizer, second), loaded, strict=True):
            part.load_state_dict(state)
        several_steps(second, range(at, STEPS))
        assert_same_run(second, whole)


def test_a_postponed_adjustment_comes_after_a_resume_too() -> None:
    first, second = begin(), begin()
    several_steps(first, range(3))
    one_step(first, 3, factor=torch.inf)
    for one, other in ((first.model, second.model), (first.optimizer, second.optimizer), (first, second)):
        other.load_state_dict(one.state_dict())
    one_step(second, 4)
    assert [event.step for event in second.events] == [5]


def test_the_state_of_another_run_is_refused() -> None:
    ranks = begin()
    several_steps(ranks, range(4))
    with pytest.raises(tsq.SettingsError, match=r"had ranks\.interval 4, and this one has 5"):
        begin(interval=5).load_state_dict(ranks.state_dict())
    with pytest.raises(tsq.SettingsError, match="other ranks than the checkpoint; load the model's state before"):
        begin().load_state_dict(ranks.state_dict())


# --- what it refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "adjust", "text"),
    [
        (3, True, "training ended at step 3, and the first adjustment was to be at step"),
        (20, False, "until step 20, the last"),
        (4, False, None),  # others were still to come
    ],
)
def test_a_run_that_ends_without_any_adjustment_warns(steps: int, adjust: bool, text: str | None) -> None:
    ranks = begin()
    for number in range(steps):
        ranks.before_forward(adjust=adjust)
        one_step(ranks, number)
    with nullcontext() if text is None else pytest.warns(UserWarning, match=text):
        ranks.finish()
    assert len(ranks.notes) == (text is not None)


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


class Own(nn.Module):
    """Somebody's own model, of which a PeftModel is a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(2, 2)

    def forward(self, **batch: Any) -> Any:
        return self.part(**batch)


def test_ranks_move_in_a_part_of_a_model(whole: paper.RankLoop) -> None:
    own = Own(certain(slotted_bert()))
    ranks = paper.RankLoop(own, adamw(own), STEPS, **PERIOD)
    several_steps(ranks, range(8))
    assert ranks.events == whole.events[:2]
    assert ranks.finish() is own.part


def test_the_model_is_found_in_what_wraps_it(whole: paper.RankLoop) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = certain(slotted_bert())
        parallel = nn.parallel.DistributedDataParallel(model)
        ranks = paper.RankLoop(parallel, adamw(model), STEPS, **PERIOD)
        assert ranks.model is model
        several_steps(ranks, range(8), model=parallel)
        assert ranks.events == whole.events[:2]
        ranks.close()
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_whose_adapter_is_frozen_is_refused() -> None:
    model = slotted_bert()
    optimizer = adamw(model)
    name, slots = next(iter(find_slots(model).items()))
    slots.b.requires_grad_(False)
    with pytest.raises(tsq.UnsupportedError, match=f"the adapter of {name} is frozen"):
        paper.RankLoop(model, optimizer, total_steps=40, interval=4)


def test_only_measured_steps_wait_for_the_device() -> None:
    ranks, waits = begin(schedule=paper.RankSchedule(warmup=0, freeze=0)), dict[int, int]()
    for step in range(1, 10):
        with waits_of_ours() as places:
            one_step(ranks, step)
        waits[step] = len(places)
    assert [step for step, count in waits.items() if count] == [1, 4, 8]
