"""Loss of each sample after an SGD step on it alone, for the whole batch in one forward pass.

A step on sample i changes its layer's output by −η x ∇Wᵢᵀ, so the outputs are stepped and no weight changes:
(W − η∇Wᵢ)x = Wx − η(x aᵢᵀ)bᵢ.  METHOD section 1.  A and B of a LoRA layer are two sites, which includes the η² term.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tsqlora.gradients.ghost import LayerGradient
from tsqlora.gradients.layers import call_input
from tsqlora.gradients.sites import Site, stepped_output


@contextmanager
def stepped(
    sites: Mapping[str, Site], gradients: Mapping[str, LayerGradient], *, eta: float, samples: int
) -> Generator[None]:
    """While open, a forward pass on the same batch uses each sample's stepped weights.

    A site without a gradient did not reach the loss and is not stepped.
    """
    with ExitStack() as hooks:
        for name, gradient in gradients.items():
            for module in sites[name].modules:
                hook = partial(_step, gradient, sites[name], eta, samples)
                # Before the module's other hooks, as the tap was.
                hooks.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield


def _step(
    gradient: LayerGradient,
    site: Site,
    eta: float,
    samples: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Tensor,
) -> Tensor:
    """Forward hook: the output after each sample's step."""
    change = stepped_output(site, module, gradient, call_input(args, kwargs), samples)
    return y.sub(change.to(y.dtype).reshape(y.shape), alpha=eta)
