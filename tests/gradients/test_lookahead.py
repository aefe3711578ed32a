"""A step of each sample's own, taken on the outputs, against really stepping the weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tsqlora.gradients.capture import capture
from tsqlora.gradients.ghost import LayerGradient, layer_gradient
from tsqlora.gradients.lookahead import stepped
from tsqlora.gradients.sites import find_sites

N, ETA = 3, 0.3


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


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, LayerGradient]:
    sites = find_sites(model, "adapter")
    found: dict[str, LayerGradient] = {}

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        found[name] = layer_gradient(a, b, **sites[name].parts)

    with capture(model, sites, consume) as tap:
        torch.autograd.grad(losses(model(x)).sum() + tap.anchor, [tap.anchor])
    return found


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3)], ids=["2-D", "one token", "3-D", "4-D"])
def test_the_stepped_loss_is_that_of_weights_really_stepped(shape: tuple[int, ...]) -> None:
    model, x = Deep(), torch.randn(N, *shape, 4, dtype=torch.float64)
    gradients = gradients_of(model, x)
    with torch.no_grad(), stepped(find_sites(model, "adapter"), gradients, eta=ETA, samples=N):
        found = losses(model(x))
    for j, row in enumerate(x.split(1)):
        alone = copy.deepcopy(model)
        losses(alone(row)).sum().backward()
        torch.optim.SGD(alone.parameters(), lr=ETA).step()
        torch.testing.assert_close(found[j : j + 1], losses(alone(row)).detach())


def test_a_site_without_a_gradient_is_not_stepped_and_no_hook_stays() -> None:
    model, x = Deep(), torch.randn(N, 4, dtype=torch.float64)
    with stepped(find_sites(model, "adapter"), {}, eta=ETA, samples=N):
        inside = model(x)
    assert torch.equal(inside, model(x))
    with pytest.raises(KeyError), stepped(find_sites(model, "adapter"), gradients_of(model, x), eta=ETA, samples=N):
        raise KeyError
    assert torch.equal(inside, model(x))
