"""What capture shows, lets go and refuses; test_exact.py compares its gradients with autograd's."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsqlora.errors import UnsupportedError
from tsqlora.paper.capture import capture, stepped
from tsqlora.paper.ghost import layer_gradient
from tsqlora.paper.sites import find_sites

N, WIDTH = 3, 4


class Around(nn.Module):
    """`use(linear, x)`, and from that one number a sample."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(not frozen)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.linear, x).tanh().flatten(1).sum(1)


def inputs(*tokens: int) -> Tensor:
    return torch.randn(N, *tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("outside", [False, True])
def test_reentrant_checkpointing_and_calls_outside_of_the_models_forward_are_refused(outside: bool) -> None:
    model = Around(lambda linear, x: checkpoint(linear, x, use_reentrant=True))
    with (
        capture(model, find_sites(model), lambda *_: None),
        pytest.raises(UnsupportedError, match=r"^linear .*use_reentrant.*compute_loss"),
    ):
        (model.linear if outside else model)(inputs(5).requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda linear, x: linear(x[0, 0]).expand(N, WIDTH),
        lambda linear, x: linear(x.transpose(0, 1)).transpose(0, 1),
        lambda linear, x: linear(x.flatten(0, 1)).unflatten(0, (N, -1)),
    ],
    ids=["one vector", "tokens first", "tokens in the batch"],
)
def test_a_layer_whose_first_dimension_is_not_the_batch_is_refused(call: Callable[[Any, Tensor], Tensor]) -> None:
    model = Around(call)
    with capture(model, find_sites(model), lambda *_: None), pytest.raises(UnsupportedError, match=r"^linear is calle"):
        model(inputs(5)).sum().backward()


def test_a_model_may_be_called_on_a_dict_its_layer_by_keyword_and_it_must_be_called_on_a_tensor() -> None:
    result: list[tuple[int, ...]] = []
    model = Around(lambda linear, batch: linear(input=batch["inner"]["x"]))
    with capture(model, find_sites(model), lambda _, a, _b: result.append(tuple(a.shape))):
        model({"scale": torch.tensor(1.0), "inner": {"x": inputs(5)}}).sum().backward()
    assert result == [(N, 5, WIDTH)]
    with capture(model, {}, lambda *_: None), pytest.raises(UnsupportedError, match="called without a tensor"):
        model([1, 2])


def test_several_passes_of_training_are_shown_one_by_one() -> None:
    model = Around(lambda linear, x: linear(x) + linear(x.sin()).detach())
    sizes: list[int] = []
    with capture(model, find_sites(model), lambda _, a, _b: sizes.append(len(a))):
        for rows in (3, 1):
            model(inputs(5)[:rows]).sum().backward()
        with torch.no_grad():
            model(inputs(5))
        losses = [model(inputs(5)[:rows]).sum() for rows in (2, 1)]
        (losses[0] + losses[1]).backward()
    assert sizes[:2] == [3, 1]
    assert sorted(sizes[2:]) == [1, 2]
    torch.testing.assert_close(model.linear.bias.grad is not None, True)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_nothing_is_left_on_the_model(fails: bool, steps: bool) -> None:
    model, x = Around(lambda linear, x: linear(x)), inputs(5)
    gradient = layer_gradient(x, x, weight=True, bias=True)
    hooks = (
        stepped(find_sites(model), {"linear": gradient}, eta=0.3, samples=N)
        if steps
        else capture(model, find_sites(model), lambda *_: None)
    )
    with suppress(ZeroDivisionError), hooks:
        model(x)
        assert model.linear._forward_hooks
        if fails:
            raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_captured_tensors_are_let_go_when_they_are_consumed() -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64) for _ in range(3)))
    alive: list[weakref.ref[Tensor]] = []
    before: list[int] = []

    def consume(_name: str, a: Tensor, b: Tensor) -> None:
        before.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(b))

    with capture(model, find_sites(model), consume):
        model(inputs(5)).square().sum().backward()
    assert before == [0, 0, 0]


def test_consumers_compute_without_autocast() -> None:
    model = Around(lambda linear, x: linear(x)).float()
    dtypes: list[torch.dtype] = []

    def consume(_name: str, a: Tensor, _b: Tensor) -> None:
        dtypes.append((a @ a.mT).dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16), capture(model, find_sites(model), consume):
        model(inputs(5).float()).sum().backward()
    assert dtypes == [torch.float32]
