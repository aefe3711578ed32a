"""What tsqlora needs of bitsandbytes that is private or differs between versions; it is never imported for that."""

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
    """Keeps bitsandbytes from packing 4-bit weights anew for inference, as on some CPUs at the first evaluation.

    No gradient passes what it packs, and shapes that are no multiple of 32 it cannot pack.
    """
    for module in model.modules():
        if linear_bits(module) == 4:
            cast(Any, module).support_avx512bf16_for_cpu = False


def is_packed_for_inference(module: nn.Module) -> bool:
    """Whether a 4-bit layer was packed anew, so that no gradient passes it."""
    return linear_bits(module) == 4 and getattr(cast(Any, module).weight.quant_state, "packing_format_for_cpu", False)


def dequantised(module: nn.Module) -> Tensor:
    """The weight of a quantised layer in floating point.

    PEFT's dequantize_module_weight gives an 8-bit layer on a CPU another weight, without its scales.
    """
    layer = cast(Any, module)
    return dequantize_bnb_weight(layer.weight, state=layer.state if linear_bits(module) == 8 else None).detach()


def optimizer_name(optimizer: torch.optim.Optimizer) -> str | None:
    """The name by which bitsandbytes knows its optimizer ("adam", "lion" …); None for another library's."""
    return cast(Any, optimizer).optimizer_name if type(optimizer).__module__.startswith("bitsandbytes.") else None


def is_eight_bit(state: Any) -> bool:
    """Whether a state of bitsandbytes' optimizers is codes of 8 bits, which stand for nothing without their scales."""
    return isinstance(state, Tensor) and state.dtype == torch.uint8
