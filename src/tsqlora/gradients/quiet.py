"""The model without its randomness, and exactly as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Dropout off while open; modes, rates and the state of the random generators restored.

    Everything goes to evaluation mode, except layers under gradient checkpointing: those
    check their own `training` flag, so it stays, and their own dropout rates are zero.
    """
    modes = [(m, m.training) for m in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    with torch.random.fork_rng():
        try:
            for module, training in modes:
                checkpointed = training and getattr(module, "gradient_checkpointing", False)
                module.training = checkpointed
                if checkpointed:
                    rates += _silence(module)
            yield
        finally:
            for module, name, rate in rates:
                setattr(module, name, rate)
            for module, training in modes:
                module.training = training


def _silence(module: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Sets a module's own dropout rates to zero; what they were."""
    rates = [
        (module, name, value)
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float)
    ]
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    return rates
