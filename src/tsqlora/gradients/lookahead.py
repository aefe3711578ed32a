"""Each sample's loss after its own step, for the whole batch in one forward pass.

Stepping sample i's weights changes its layer's output by −η x ∇Wᵢᵀ, so the step is taken
on the outputs and no weight is touched:  (W − η∇Wᵢ)x = Wx − η(x aᵢᵀ)bᵢ.  METHOD section 1.
A and B of a LoRA layer are two sites, so its η² term is there too.
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
    """While open, the model's forward on the same batch is each sample's stepped one.

    A site without a gradient was not used by the loss, and is not stepped.
    """
    with ExitStack() as hooks:
        for name, gradient in gradients.items():
            for module in sites[name].modules:
                hook = partial(_step, gradient, sites[name], eta, samples)
                # First of the module's hooks, as the tap was: others may change what it returns.
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
    """A forward hook: the output after each sample's step."""
    change = stepped_output(site, module, gradient, call_input(args, kwargs), samples)
    return y.sub(change.to(y.dtype).reshape(y.shape), alpha=eta)
