from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes.optim as bnb
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers.optimization import Adafactor

import tsqlora as tsq
from models import samples
from scoring import logits_of
from slotted import (
    OPTIMIZERS,
    POOLER,
    QUERY,
    WIDE,
    assert_hidden_are_zero,
    backward,
    take_steps,
    trained,
    updates,
    wrapped,
)
from tsqlora import paper
from tsqlora.paper.change import drop_slots, grow_slot, moments, second_moment_means
from tsqlora.paper.slots import Slots, find_slots

ROWS = samples(5, 3)


def everything(slots: Slots, optimizer: torch.optim.Optimizer, keep: list[int]) -> list[Tensor]:
    """Weights and moments of some slots."""
    chosen: list[Tensor] = []
    for parameter, dim in slots.matrices():
        states = [state.read() for state in moments(parameter, optimizer).values()]
        for tensor in [parameter.detach(), *states]:
            chosen.append(tensor.index_select(dim, torch.tensor(keep)).clone())
    return chosen


def stepped(make: Any, steps: int, **options: Any) -> tuple[PeftModel, torch.optim.Optimizer, Slots]:
    """A wrapped model behind some steps, its optimizer, and the slots of one layer."""
    model = wrapped(**options)
    optimizer = make(trained(model))
    take_steps(model, optimizer, steps)
    return model, optimizer, find_slots(model)[QUERY]


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


def accelerated(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return Accelerator(cpu=True).prepare_optimizer(optimizer)


# Every optimizer of torch, with the options that change what it keeps.
ELEMENTWISE: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = OPTIMIZERS | {
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rmsprop, centred": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[::2], "lr": 0.01}, {"params": p[1::2], "lr": 0.02, "weight_decay": 0.3}]
    ),
    "as the Trainer has it": lambda p: accelerated(torch.optim.AdamW(p, lr=0.01)),
}
REFUSED: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01),
}
OF_LIBRARIES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adafactor of transformers": lambda p: Adafactor(p, lr=0.01, scale_parameter=False, relative_step=False),
    "Adafactor as the Trainer has it": lambda p: accelerated(
        Adafactor(p, lr=0.01, scale_parameter=False, relative_step=False)
    ),
    "AdamW8bit": lambda p: bnb.AdamW8bit(p, lr=0.01, min_8bit_size=1),
    "AdEMAMix": lambda p: bnb.AdEMAMix(p, lr=0.01),
}


def test_every_optimizer_of_torch_is_served_or_refused() -> None:
    everyone = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer"}
    parameters = trained(wrapped())
    served = {type(make(parameters)).__name__ for make in ELEMENTWISE.values()} - {"AcceleratedOptimizer"}
    # SparseAdam takes sparse gradients only, and LoRA's are not.
    assert everyone == served | REFUSED.keys() | {"SparseAdam"}


@pytest.mark.parametrize("name", [*REFUSED, *OF_LIBRARIES])
def test_an_optimizer_whose_step_is_not_one_for_each_number_is_refused_by_name(name: str) -> None:
    model = wrapped(dtype=torch.float32)
    slots = find_slots(model)[QUERY]
    optimizer = (REFUSED | OF_LIBRARIES)[name](trained(model))
    backward(model)
    optimizer.step(*([lambda: 1.0] if name == "LBFGS" else []))
    before = slots.a.detach().clone()
    named = f"the optimizer {name.partition(' ')[0]} "
    with pytest.raises(tsq.UnsupportedError, match=named):
        drop_slots(slots, [0], optimizer)
    with pytest.raises(tsq.UnsupportedError, match=named):
        grow_slot(slots, torch.ones(16), optimizer)
    assert torch.equal(slots.a.detach(), before)
    assert slots.rank == 4


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_next_step_of_kept_slots_is_bit_equal_to_that_without_a_change(name: str) -> None:
    make, from_zero = ELEMENTWISE[name], name in OPTIMIZERS  # others' states do not begin at zero
    (model, optimizer, slots), (twin, other, before) = stepped(make, 3), stepped(make, 3)
    drop_slots(slots, [1], optimizer)
    drop_slots(find_slots(model)[POOLER], [0, 1, 2, 3], optimizer)
    assert_hidden_are_zero(model, optimizer if from_zero else None)  # gradients too: they are there still
    grow_slot(slots, torch.randn(16), optimizer)
    grow_slot(find_slots(model)[WIDE], torch.randn(16), optimizer)
    step_with_gradients_of(model, optimizer)
    step_with_gradients_of(twin, other)
    for left, right in zip(everything(slots, optimizer, [0, 1, 2]), everything(before, other, [0, 2, 3]), strict=True):
        assert torch.equal(left, right)
    grown = everything(find_slots(model)[WIDE], optimizer, [0, 1, 2, 3])
    for left, right in zip(grown, everything(find_slots(twin)[WIDE], other, [0, 1, 2, 3]), strict=True):
        assert torch.equal(left, right)
    take_steps(model, optimizer, 1)
    assert_hidden_are_zero(model, optimizer if from_zero else None)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_growing_leaves_the_update_unchanged(dtype: torch.dtype, error: float) -> None:
    model = wrapped(dtype=dtype)
    before, logits = updates(model), logits_of(model, ROWS)
    for slots in find_slots(model).values():
        grow_slot(slots, torch.randn(slots.shape[0]), None)
        grow_slot(slots, torch.randn(slots.shape[0]), None)
    assert set(paper.active_ranks(model).values()) == {6}
    for name, update in updates(model).items():
        assert torch.equal(update, before[name]), name
    assert float((logits_of(model, ROWS) - logits).abs().max()) <= error


def test_dropping_removes_exactly_those_slots_from_the_update() -> None:
    model = wrapped()
    slots = find_slots(model)[QUERY]
    a, b = slots.a.detach().clone(), slots.b.detach().clone()
    drop_slots(slots, [3, 0], None)
    torch.testing.assert_close(updates(model)[QUERY], slots.scale * b[:, [1, 2]] @ a[[1, 2]])


BITS = {f"{kind.__name__} in 32 bits": partial(kind, lr=0.01) for kind in (bnb.AdamW, bnb.Lion, bnb.RMSprop)}


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "asgd", *BITS])
def test_a_new_slot_starts_without_first_moment_at_the_mean_second_and_at_its_own_average(name: str) -> None:
    model, optimizer, slots = stepped((ELEMENTWISE | BITS)[name], 2, dtype=torch.float32)
    row = torch.randn(16)
    before = everything(slots, optimizer, [0, 1, 3])
    drop_slots(slots, [2], optimizer)
    grow_slot(slots, row, optimizer)
    for left, right in zip(everything(slots, optimizer, [0, 1, 2]), before, strict=True):
        assert torch.equal(left, right)
    for (parameter, dim), weight in zip(slots.matrices(), (row, torch.zeros(16)), strict=True):
        for key, state in moments(parameter, optimizer).items():
            new, mean = state.read().select(dim, 3), state.read().narrow(dim, 0, 3).mean(dim)
            expected = {"zero": torch.zeros_like(new), "mean": mean, "weight": weight}[state.beginning]
            torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-12)
            assert state.beginning != "mean" or bool((new > 0).all()), key
    take_steps(model, optimizer, 1)
    assert_hidden_are_zero(model, optimizer)


def test_a_new_slot_of_an_empty_layer_starts_with_the_mean_second_moment_of_all_layers() -> None:
    model, optimizer, slots = stepped(OPTIMIZERS["adamw"], 2)
    drop_slots(slots, [0, 1, 2, 3], optimizer)
    layers = find_slots(model)
    fallback = second_moment_means(layers, optimizer)
    for side, dim in ((0, 0), (1, 1)):
        others = [optimizer.state[s.matrices()[side][0]]["exp_avg_sq"] for n, s in layers.items() if n != QUERY]
        target = torch.cat([state.narrow(dim, 0, 4).flatten() for state in others]).mean()
        assert fallback[side] == {"exp_avg_sq": pytest.approx(float(target))}
    grow_slot(slots, torch.randn(16), optimizer, fallback=fallback)
    assert bool((optimizer.state[slots.a]["exp_avg_sq"][0] == fallback[0]["exp_avg_sq"]).all())
    assert bool((optimizer.state[slots.b]["exp_avg_sq"][:, 0] == fallback[1]["exp_avg_sq"]).all())


def test_without_steps_there_are_no_moments_to_go_by() -> None:
    model = wrapped()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    assert second_moment_means(find_slots(model), optimizer) == ({}, {})
    drop_slots(find_slots(model)[QUERY], [0], optimizer)
    grow_slot(find_slots(model)[QUERY], torch.ones(16), optimizer)
    assert not optimizer.state


COUPLED = ["LAMB", "FusedLAMB", "Lamb", "LARS", "LARSWrapper", "NovoGrad", "AdamP", "SGDP", "StableAdamW"]
COUPLED += ["DistributedShampoo", "SOAP", "SingleDeviceMuonWithAuxAdam"]
COUPLED += ["ZeroRedundancyOptimizer", "CPUOffloadOptimizer"]


def test_an_optimizer_that_couples_numbers_is_refused_also_in_a_subclass() -> None:
    """They keep what Adam or SGD keep, under the same names."""
    model = wrapped()
    for name in COUPLED:
        kind = type(name, (torch.optim.AdamW,), {})
        for made in (kind, type("Mine", (kind,), {})):
            with pytest.raises(tsq.UnsupportedError, match=f"the optimizer {made.__name__} "):
                moments(find_slots(model)[QUERY].a, made(trained(model), lr=0.01))
    for name in ("LambdaAdam", "AdamPlus", "AdamW"):
        served = type(name, (torch.optim.AdamW,), {})(trained(model), lr=0.01)
        take_steps(model, served, 1)
        assert moments(find_slots(model)[QUERY].a, served).keys() == {"exp_avg", "exp_avg_sq"}


class Packed(Tensor):
    """Pack a tensor in a library's own form."""


class Keeps(torch.optim.SGD):
    """An optimizer that keeps something else besides."""

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for parameter in parameters:
            self.state[parameter] = dict(options)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"z": torch.zeros(8, 16)}, r"'z' of shape \(8, 16\) for a weight of shape \(8, 16\)"),
        ({"exp_avg": [torch.zeros(8, 16)]}, "'exp_avg' of type list"),
        ({"exp_avg": Packed(torch.zeros(8, 16))}, "'exp_avg' of type Packed"),
    ],
)
def test_a_state_that_is_in_no_table_is_refused(state: dict[str, Any], words: str) -> None:
    model = wrapped()
    with pytest.raises(tsq.UnsupportedError, match=f"the optimizer Keeps keeps {words}"):
        moments(find_slots(model)[QUERY].a, Keeps(trained(model), **state))


def test_numbers_of_a_whole_weight_stay() -> None:
    model = wrapped()
    optimizer = Keeps(trained(model), step=torch.tensor(3.0), RMS=0.5, momentum_buffer=None)
    assert moments(find_slots(model)[QUERY].a, optimizer) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_in_another_precision_than_the_weights_move_bit_for_bit(dtype: torch.dtype) -> None:
    model = wrapped()
    slots = find_slots(model)[QUERY]
    state = torch.randn(slots.a.shape).to(dtype)
    optimizer = Keeps([slots.a], exp_avg=state.clone(), exp_avg_sq=state.square())
    drop_slots(slots, [1], optimizer)
    grow_slot(slots, torch.randn(16), optimizer)
    moved = optimizer.state[slots.a]
    assert torch.equal(moved["exp_avg"][:3], state[[0, 2, 3]])
    assert not moved["exp_avg"][3].any()
    torch.testing.assert_close(moved["exp_avg_sq"][3], state.square()[[0, 2, 3]].mean(0))
