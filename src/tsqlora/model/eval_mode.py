"""Run a model without randomness, and restore it exactly afterwards."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Turn off dropout and compiled code; on exit restore modes, dropout rates and random generators.

    All modules go to evaluation mode. The exception, only where gradients are computed, are layers under gradient
    checkpointing: they check their own `training` flag, so it stays and their dropout rates become zero. Without
    gradients they go to evaluation mode too, because in training mode they would generate text without a cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    # Eager: compiling another version of the model for one or two passes would take longer.
    with same_randomness(model), cast(Any, torch.compiler).set_stance("force_eager"):
        try:
            for module, training in modes:
                checkpoints = torch.is_grad_enabled() and bool(getattr(module, "gradient_checkpointing", False))
                module.training = training and checkpoints
                if module.training:
                    own = [(n, v) for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]
                    for name, rate in own:
                        rates.append((module, name, rate))
                        setattr(module, name, 0.0)
            yield
        finally:
            for module, name, rate in rates:
                setattr(module, name, rate)
            for module, training in modes:
                module.training = training


@contextmanager
def same_randomness(model: nn.Module | None = None, *, seed: int | None = None) -> Generator[None]:
    """Restore the global random generators of torch, numpy and Python on exit; a `seed` sets those of the CPU first."""
    # Name the devices: without a list torch warns on a machine with several GPUs.
    devices = {p.device.index for p in (() if model is None else model.parameters()) if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with cast(Any, torch.random).fork_rng(sorted(devices)):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
