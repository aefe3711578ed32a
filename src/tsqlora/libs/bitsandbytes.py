"""Interfaces of bitsandbytes that are private or differ between versions; nothing here imports it."""

from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

_LINEAR = {"Linear4bit": 4, "Linear8bitLt": 8}


def linear_bits(module: nn.Module) -> int:
    """4 or 8 for a quantised linear layer of bitsandbytes, else 0."""
    kind = type(module)
    return _LINEAR.get(kind.__name__, 0) if kind.__module__ == "bitsandbytes.nn.modules" else 0


def keep_as_trained(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, as on some CPUs at the first evaluation.

    Repacked weights pass no gradient, and shapes must be multiples of 32.
    """
    for module in model.modules():
        if linear_bits(module) == 4:
            cast(Any, module).support_avx512bf16_for_cpu = False


def is_packed_for_inference(module: nn.Module) -> bool:
    """Whether a 4-bit layer was repacked, so that it passes no gradient."""
    return linear_bits(module) == 4 and getattr(cast(Any, module).weight.quant_state, "packing_format_for_cpu", False)


def dequantised(module: nn.Module) -> Tensor:
    """The weight of a quantised layer in floating point.

    PEFT's dequantize_module_weight ignores the scales of an 8-bit layer on a CPU.
    """
    layer = cast(Any, module)
    return dequantize_bnb_weight(layer.weight, state=layer.state if linear_bits(module) == 8 else None).detach()


def optimizer_name(optimizer: torch.optim.Optimizer) -> str | None:
    """bitsandbytes' name of its optimizer ("adam", "lion" …); None for another library's."""
    return cast(Any, optimizer).optimizer_name if type(optimizer).__module__.startswith("bitsandbytes.") else None


def is_eight_bit(state: Any) -> bool:
    """Whether an optimizer state holds 8-bit codes, which mean nothing without their scales."""
    return isinstance(state, Tensor) and state.dtype == torch.uint8
