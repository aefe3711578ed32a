"""A stand-in for a device that has no float64, as Apple's MPS: what would fail there fails on the processor."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tsqlora.libs import torch as ours

_OF_PROCESSOR = "aten.randn.generator"
"""Draws of a generator of the processor."""
_BACK = ("aten._to_copy", "aten.copy_")
"""From float64 on the processor to the device's own numbers."""


class _NoFloat64(TorchDispatchMode):
    """Tensors of float64 count as the processor's, other floats as the device's: only `double` leads from one to the
    other, and no operation takes both, but for single numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arguments = [x for x in tree_leaves((args, kwargs)) if _is_float(x)]
        wide = [x for x in arguments if x.dtype == torch.float64]
        if (
            not wide
            and str(func) != _OF_PROCESSOR
            and any(x.dtype == torch.float64 for x in tree_leaves(result) if _is_float(x))
        ):
            raise TypeError(f"{func} makes float64 on the device")
        others = [x for x in arguments if x.dtype != torch.float64]
        if not str(func).startswith(_BACK) and any(x.dim() for x in wide) and any(x.dim() for x in others):
            raise TypeError(f"{func} takes float64 of the processor beside numbers of the device")
        return result


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@contextmanager
def without_float64() -> Iterator[None]:
    """While open, float64 is made by `compat.torch.double` alone."""
    real = ours.double

    def double(x: Tensor) -> Tensor:
        with _disable_current_modes():
            return real(x)

    users = [module for name, module in sys.modules.items() if name.startswith("tsqlora.") and "double" in vars(module)]
    with pytest.MonkeyPatch.context() as patch, _NoFloat64():
        for module in users:
            patch.setattr(module, "double", double)
        yield
