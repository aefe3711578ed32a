"""The model without its randomness, and exactly as it was afterwards."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Dropout off and nothing compiled while open; modes, rates and the state of the random generators restored.

    Everything goes to evaluation mode, except, where gradients are computed, layers under gradient checkpointing:
    those check their own `training` flag, so it stays, and their own dropout rates are zero. Without gradients there
    is nothing to keep, and a layer that thinks it trains would write text without a cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    # Not compiled: that would take one more version of the model in evaluation mode, for a pass or two.
    with _same_randomness(model), cast(Any, torch.compiler).set_stance("force_eager"):
        try:
            for module, training in modes:
                checkpoints = torch.is_grad_enabled() and bool(getattr(module, "gradient_checkpointing", False))
                module.training = training and checkpoints
                if module.training:
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
        (module, name, value) for name, value in vars(module).items() if "drop" in name and isinstance(value, float)
    ]
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    return rates


@contextmanager
def _same_randomness(model: nn.Module) -> Generator[None]:
    """torch's, numpy's and Python's global generators go on afterwards as if nothing was drawn."""
    # Those of the model's devices; without a list, torch warns on a machine with several.
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with cast(Any, torch.random).fork_rng(sorted(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
