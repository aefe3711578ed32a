import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

import tsqlora as tsq
from models import samples, tiny_bert, tiny_llama_classifier
from oracles import slow_adamw_step
from scoring import logits_of
from slotted import OPTIMIZERS, QUERY, WIDE, assert_hidden_are_zero, backward, take_steps, trained, updates, wrapped
from tsqlora.adapter.resize import drop_slots, grow_slot, moments, second_moment_means
from tsqlora.adapter.slots import Slots, find_slots

ROWS = samples(5, 3)


def everything(slots: Slots, optimizer: torch.optim.Optimizer, keep: list[int]) -> list[Tensor]:
    """Weights and moments of some slots."""
    chosen: list[Tensor] = []
    for parameter, dim in slots.matrices():
        for tensor in [parameter.detach(), *moments(parameter, optimizer).values()]:
            chosen.append(tensor.index_select(dim, torch.tensor(keep)).clone())
    return chosen


def step_with_gradients_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step whose gradients do not depend on what the model computes."""
    generator = torch.Generator().manual_seed(7)
    noise = {
        name: torch.randn(s.a.shape[1] + s.b.shape[0], generator=generator) for name, s in find_slots(model).items()
    }
    for name, slots in find_slots(model).items():
        i = slots.shape[0]
        for parameter, part, dim in ((slots.a, noise[name][:i], 0), (slots.b, noise[name][i:], 1)):
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.narrow(dim, 0, slots.rank).copy_(
                part.unsqueeze(dim).expand_as(parameter.grad.narrow(dim, 0, slots.rank))
            )
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_next_step_of_kept_slots_is_bit_equal_to_that_without_a_change(make) -> None:  # type: ignore[no-untyped-def]
    model, twin = wrapped(), wrapped()
    optimizer, other = make(trained(model)), make(trained(twin))
    take_steps(model, optimizer, 3)
    take_steps(twin, other, 3)
    slots, before = find_slots(model)[QUERY], find_slots(twin)[QUERY]
    drop_slots(slots, [1], optimizer)
    grow_slot(slots, torch.randn(16), optimizer)
    grow_slot(find_slots(model)[WIDE], torch.randn(16), optimizer)
    step_with_gradients_of(model, optimizer)
    step_with_gradients_of(twin, other)
    for left, right in zip(everything(slots, optimizer, [0, 1, 2]), everything(before, other, [0, 2, 3]), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(
        everything(find_slots(model)[WIDE], optimizer, [0, 1, 2, 3]),
        everything(find_slots(twin)[WIDE], other, [0, 1, 2, 3]),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_kept_slots_step_as_the_textbook_says() -> None:
    model = wrapped()
    optimizer = OPTIMIZERS["weight decay"](trained(model))
    take_steps(model, optimizer, 3)
    slots = find_slots(model)[QUERY]
    drop_slots(slots, [0, 2], optimizer)
    grow_slot(slots, torch.randn(16), optimizer)
    backward(model)
    state, options = optimizer.state[slots.a], optimizer.param_groups[0]
    wanted, _, _ = slow_adamw_step(
        slots.a.detach().clone(),
        slots.a.grad,  # type: ignore[arg-type]
        state["exp_avg"].clone(),
        state["exp_avg_sq"].clone(),
        4,
        **{name: options[name] for name in ("lr", "betas", "eps", "weight_decay")},
    )
    optimizer.step()
    torch.testing.assert_close(slots.a.detach(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("base", [tiny_bert, tiny_llama_classifier])
def test_growing_leaves_the_update_unchanged(base, dtype: torch.dtype, error: float) -> None:  # type: ignore[no-untyped-def]
    model = wrapped(base(dtype=dtype), dtype=dtype)
    before, logits = updates(model), logits_of(model, ROWS)
    for slots in find_slots(model).values():
        grow_slot(slots, torch.randn(slots.shape[0]), None)
        grow_slot(slots, torch.randn(slots.shape[0]), None)
    assert set(tsq.active_ranks(model).values()) == {6}
    for name, update in updates(model).items():
        assert torch.equal(update, before[name]), name
    assert float((logits_of(model, ROWS) - logits).abs().max()) <= error


def test_dropping_removes_exactly_those_slots_from_the_update() -> None:
    model = wrapped()
    slots = find_slots(model)[QUERY]
    a, b = slots.a.detach().clone(), slots.b.detach().clone()
    drop_slots(slots, [3, 0], None)
    torch.testing.assert_close(updates(model)[QUERY], slots.scale * b[:, [1, 2]] @ a[[1, 2]])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_inactive_slots_stay_exactly_zero(make) -> None:  # type: ignore[no-untyped-def]
    model = wrapped()
    optimizer = make(trained(model))
    take_steps(model, optimizer, 2)
    slots = find_slots(model)[QUERY]
    drop_slots(slots, [0, 1, 3], optimizer)
    assert_hidden_are_zero(model, optimizer)  # gradients too: they are there still
    drop_slots(find_slots(model)[WIDE], [0, 1, 2, 3], optimizer)
    grow_slot(slots, torch.randn(16), optimizer)
    take_steps(model, optimizer, 2)
    assert_hidden_are_zero(model, optimizer)
    assert tsq.active_ranks(model)[WIDE] == 0


@pytest.mark.parametrize("name", ["adamw", "amsgrad"])
def test_a_new_slot_starts_with_the_mean_second_moment_of_those_kept_and_no_first(name: str) -> None:
    model = wrapped()
    optimizer = OPTIMIZERS[name](trained(model))
    take_steps(model, optimizer, 2)
    slots = find_slots(model)[QUERY]
    drop_slots(slots, [2], optimizer)
    grow_slot(slots, torch.randn(16), optimizer)
    for parameter, dim in slots.matrices():
        for key, state in moments(parameter, optimizer).items():
            new, kept = state.select(dim, 3), state.narrow(dim, 0, 3).mean(dim)
            assert torch.equal(new, torch.zeros_like(new) if key == "exp_avg" else kept), key
            assert key == "exp_avg" or bool((new > 0).all())


def test_a_new_slot_of_an_empty_layer_starts_with_the_mean_second_moment_of_all_layers() -> None:
    model = wrapped()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    take_steps(model, optimizer, 2)
    slots = find_slots(model)[QUERY]
    drop_slots(slots, [0, 1, 2, 3], optimizer)
    layers = find_slots(model)
    fallback = second_moment_means(layers, optimizer)
    for side, dim in ((0, 0), (1, 1)):
        others = [optimizer.state[s.matrices()[side][0]]["exp_avg_sq"] for n, s in layers.items() if n != QUERY]
        wanted = torch.cat([state.narrow(dim, 0, 4).flatten() for state in others]).mean()
        assert fallback[side] == pytest.approx(float(wanted))
    grow_slot(slots, torch.randn(16), optimizer, fallback=fallback)
    assert bool((optimizer.state[slots.a]["exp_avg_sq"][0] == fallback[0]).all())
    assert bool((optimizer.state[slots.b]["exp_avg_sq"][:, 0] == fallback[1]).all())


def test_without_steps_there_are_no_moments_to_go_by() -> None:
    model = wrapped()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    assert second_moment_means(find_slots(model), optimizer) == (0.0, 0.0)
    drop_slots(find_slots(model)[QUERY], [0], optimizer)
    grow_slot(find_slots(model)[QUERY], torch.ones(16), optimizer)
    assert not optimizer.state


def test_an_optimizer_with_unknown_state_is_refused_by_name() -> None:
    model = wrapped(dtype=torch.float32)
    optimizer = Adafactor(trained(model), lr=0.01, scale_parameter=False, relative_step=False)
    take_steps(model, optimizer, 1)
    slots = find_slots(model)[QUERY]
    before = copy.deepcopy(slots.a.detach())
    with pytest.raises(tsq.UnsupportedError, match=r"keeps 'exp_avg_sq_row' of shape \(8,\).*use AdamW, Adam or SGD"):
        drop_slots(slots, [0], optimizer)
    assert torch.equal(slots.a.detach(), before)
    assert slots.rank == 4
