"""A step of each sample's own, taken on the outputs, against really stepping the weight."""

import pytest
import torch
from torch import Tensor, nn

from tsqlora.gradients.capture import capture
from tsqlora.gradients.ghost import LayerGradient, layer_gradient
from tsqlora.gradients.lookahead import stepped
from tsqlora.gradients.sites import find_sites

N, ETA = 3, 0.3


def net() -> nn.Module:
    """Layers behind one another, so that the stepped pass has inputs of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)).double()


def losses(y: Tensor) -> Tensor:
    return y.square().flatten(1).sum(1)


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, LayerGradient]:
    sites = find_sites(model, "adapter")
    found: dict[str, LayerGradient] = {}

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        found[name] = layer_gradient(a, b, weight=sites[name].weight, bias=sites[name].bias)

    with capture(model, sites, consume) as tap:
        torch.autograd.grad(losses(model(x)).sum() + tap.anchor, [tap.anchor])
    return found


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=["2-D", "3-D", "4-D"])
def test_the_stepped_loss_is_that_of_weights_really_stepped(shape: tuple[int, ...]) -> None:
    model, x = net(), torch.randn(N, *shape, 4, dtype=torch.float64)
    gradients = gradients_of(model, x)
    with torch.no_grad(), stepped(find_sites(model, "adapter"), gradients, eta=ETA, samples=N):
        found = losses(model(x))
    for j, row in enumerate(x.split(1)):
        alone = net()
        losses(alone(row)).sum().backward()
        torch.optim.SGD(alone.parameters(), lr=ETA).step()
        torch.testing.assert_close(found[j : j + 1], losses(alone(row)).detach())


def test_a_site_without_a_gradient_is_not_stepped_and_no_hook_stays() -> None:
    model, x = net(), torch.randn(N, 4, dtype=torch.float64)
    with stepped(find_sites(model, "adapter"), {}, eta=ETA, samples=N):
        inside = model(x)
    assert torch.equal(inside, model(x))
    with pytest.raises(KeyError), stepped(find_sites(model, "adapter"), gradients_of(model, x), eta=ETA, samples=N):
        raise KeyError
    assert torch.equal(inside, model(x))
