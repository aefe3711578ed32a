"""What capture shows is each sample's own gradient, as autograd has it for that sample alone."""

import copy
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsqlora.errors import UnsupportedError
from tsqlora.paper.capture import capture, stepped
from tsqlora.paper.ghost import LayerGradient, layer_gradient
from tsqlora.paper.sites import Site, find_sites

N, WIDTH, ETA = 3, 4, 0.3


class Around(nn.Module):
    """`use(linear, x)`, and from that one number a sample."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(not frozen)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.linear, x).tanh().flatten(1).sum(1)


def gradients_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = torch.sum) -> dict[str, LayerGradient]:
    """Each sample's gradients by site, in the order in which they came; a site comes once."""
    sites = find_sites(model)
    arrived: dict[str, LayerGradient] = {}

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        assert name not in arrived
        arrived[name] = layer_gradient(a, b, **sites[name].parts)

    with capture(model, sites, consume) as tap:
        torch.autograd.grad(loss(model(x)).sum() + tap.anchor, tap.anchor)
    return arrived


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """The same, one sample at a time, by autograd."""
    own = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for j in range(len(x)):
        grads = torch.autograd.grad(model(x[j : j + 1]).sum(), own, allow_unused=True)
        norms.append(sum((g.square().sum() for g in grads if g is not None), torch.zeros((), dtype=x.dtype)))
    return torch.stack(norms)


def assert_exact(model: nn.Module, x: Tensor) -> None:
    norms = torch.stack([gradient.norm_sq() for gradient in gradients_of(model, x).values()]).sum(0)
    torch.testing.assert_close(norms, alone(model, x), rtol=1e-10, atol=0)


def inputs(*tokens: int) -> Tensor:
    return torch.randn(N, *tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [(), (1,), (5,), (9,), (2, 3)], ids=str)
def test_all_dimensions_between_batch_and_features_are_tokens(tokens: tuple[int, ...]) -> None:
    assert_exact(Around(lambda linear, x: linear(x)), inputs(*tokens))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).square().flatten(1).sum(1)


def test_a_weight_of_two_modules_is_one_site_whose_uses_are_summed() -> None:
    assert list(gradients_of(Tied(), inputs(5))) == ["first"]
    assert_exact(Tied(), inputs(5))


def _unused_call(linear: nn.Linear, x: Tensor) -> Tensor:
    linear(x.flip(1))
    return linear(x) + linear(x.sin()).detach()


def _call_without_gradients(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = linear(x.flip(1))
    return linear(x) + target


def _checkpointed(linear: nn.Linear, x: Tensor) -> Tensor:
    def twice(linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(linear(x).tanh())

    return linear(checkpoint(twice, linear, x, use_reentrant=False))


@pytest.mark.parametrize(
    "use",
    [
        lambda linear, x: F.relu_(linear(x)),
        lambda linear, x: linear(x).add_(x),
        lambda linear, x: linear(input=x),
        lambda linear, x: linear(linear(x).tanh()),
        lambda linear, x: torch.cat([linear(x), linear(x[:, :2]).sin()], dim=1),
        _unused_call,
        _call_without_gradients,
        _checkpointed,
    ],
    ids=["relu_", "add_", "by keyword", "twice", "other tokens", "unused", "no grad", "checkpointed"],
)
def test_gradients_are_exact_however_the_model_calls_its_layer_also_under_other_hooks(
    use: Callable[[Any, Tensor], Tensor],
) -> None:
    model = Around(use)
    assert_exact(model, inputs(5))
    model.linear.register_forward_hook(lambda _m, _args, y: 3 * y)
    model.linear.register_forward_pre_hook(lambda _m, args: (args[0].sin(),) if args else None)
    assert_exact(model, inputs(5))


def test_a_frozen_layer_behind_nothing_that_trains_is_seen_too() -> None:
    model, frozen = Around(lambda linear, x: linear(x)), Around(lambda linear, x: linear(x), frozen=True)
    site = {"linear": Site("linear", (frozen.linear,), True, True)}
    norms: list[Tensor] = []
    with capture(
        frozen, site, lambda _, a, b: norms.append(layer_gradient(a, b, weight=True, bias=True).norm_sq())
    ) as tap:
        torch.autograd.grad(frozen(inputs(5)).sum(), tap.anchor, allow_unused=True)
    torch.testing.assert_close(norms[0], alone(model, inputs(5)))


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
    with pytest.raises(UnsupportedError, match=r"^linear is called on"):
        gradients_of(Around(call), inputs(5))


def test_a_model_may_be_called_on_a_dict_and_must_be_called_on_a_tensor() -> None:
    result: list[tuple[int, ...]] = []
    model = Around(lambda linear, batch: linear(batch["inner"]["x"]))
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
def test_nothing_is_left_on_the_model(fails: bool) -> None:
    model = Around(lambda linear, x: linear(x))
    with suppress(ZeroDivisionError), capture(model, find_sites(model), lambda *_: None):
        model(inputs(5))
        assert model.linear._forward_hooks
        if fails:
            raise ZeroDivisionError
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


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


# --- stepped ------------------------------------------------------------------------------


class Deep(nn.Module):
    """Layers behind one another, one called twice, one tied, one not used; others' hooks on top."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(4, 5, dtype=torch.float64)
            self.twice = nn.Linear(5, 5, dtype=torch.float64)
            self.tied = nn.Linear(5, 5, bias=False, dtype=torch.float64)
            self.again = nn.Linear(5, 5, bias=False, dtype=torch.float64)
            self.unused = nn.Linear(5, 5, dtype=torch.float64)
        self.again.weight = self.tied.weight
        self.first.register_forward_hook(lambda _m, _args, y: 2 * y)
        self.first.register_forward_pre_hook(lambda _m, args: (args[0].sin(),))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(input=self.twice(self.first(x).tanh()).tanh())
        return self.again(self.tied(x).tanh())


def losses(y: Tensor) -> Tensor:
    return y.square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3)], ids=["2-D", "one token", "3-D", "4-D"])
def test_the_stepped_loss_is_that_of_weights_really_stepped(shape: tuple[int, ...]) -> None:
    model, x = Deep(), torch.randn(N, *shape, 4, dtype=torch.float64)
    gradients = gradients_of(model, x, losses)
    with torch.no_grad(), stepped(find_sites(model), gradients, eta=ETA, samples=N):
        result = losses(model(x))
    for j, row in enumerate(x.split(1)):
        alone = copy.deepcopy(model)
        losses(alone(row)).sum().backward()
        torch.optim.SGD(alone.parameters(), lr=ETA).step()
        torch.testing.assert_close(result[j : j + 1], losses(alone(row)).detach())


def test_a_site_without_a_gradient_is_not_stepped_and_no_hook_stays() -> None:
    model, x = Deep(), torch.randn(N, 4, dtype=torch.float64)
    with stepped(find_sites(model), {}, eta=ETA, samples=N):
        inside = model(x)
    assert torch.equal(inside, model(x))
    with pytest.raises(KeyError), stepped(find_sites(model), gradients_of(model, x, losses), eta=ETA, samples=N):
        raise KeyError
    assert torch.equal(inside, model(x))
