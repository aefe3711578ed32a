"""The contract with bitsandbytes: a failure here says which of its interfaces has changed."""

import pytest
import torch
from torch import nn

from tsqlora.libs.bitsandbytes import (
    dequantised,
    is_eight_bit,
    is_packed_for_inference,
    keep_as_trained,
    linear_bits,
    optimizer_name,
)

# torch warns of its own script_method, which bitsandbytes imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
bitsandbytes = pytest.importorskip("bitsandbytes")


def packed(bits: int) -> nn.Module:
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    options = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
    layer = kind(64, 64, bias=False, **options)
    torch.manual_seed(0)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    return layer.to("cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_layer_is_known_by_its_class_and_its_weight_can_be_read(bits: int) -> None:
    """The classes `bitsandbytes.nn.modules.Linear4bit` and `Linear8bitLt`, and PEFT's dequantize_bnb_weight."""
    layer = packed(bits)
    assert (linear_bits(layer), linear_bits(nn.Linear(2, 2))) == (bits, 0)
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    x = torch.eye(64)
    torch.testing.assert_close(layer(x), dequantised(layer).T, rtol=0.05, atol=0.05)
    assert float((dequantised(layer) - weight).norm() / weight.norm()) < 0.15


def test_packing_for_inference_can_be_forbidden_and_seen() -> None:
    """`Linear4bit.support_avx512bf16_for_cpu` and `QuantState.packing_format_for_cpu`."""
    layer = packed(4)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    keep_as_trained(layer)
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    assert not is_packed_for_inference(layer)
    layer.weight.quant_state.packing_format_for_cpu = True
    assert is_packed_for_inference(layer)


@pytest.mark.parametrize(("kind", "name"), [("AdamW", "adam"), ("Lion", "lion"), ("RMSprop", "rmsprop")])
def test_optimizers_have_a_name_and_keep_32_or_8_bits(kind: str, name: str) -> None:
    """`Optimizer.optimizer_name`; states `state1` and `state2`, in 8 bits uint8."""
    for bits in (32, 8):
        parameter = nn.Parameter(torch.ones(64))
        parameter.grad = torch.ones(64)
        optimizer = getattr(bitsandbytes.optim, kind)([parameter], optim_bits=bits, min_8bit_size=1)
        optimizer.step()
        assert optimizer_name(optimizer) == name
        assert is_eight_bit(optimizer.state[parameter]["state1"]) == (bits == 8)
    assert optimizer_name(torch.optim.SGD([parameter], lr=1)) is None
