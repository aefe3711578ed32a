"""What is computed follows the active rank, not the capacity."""

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import tiny_bert
from slotted import QUERY, WIDE, backward, wrapped


def operations(model: nn.Module) -> int:
    """Floating-point operations of the matrix products of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        backward(model)
    return counter.get_total_flops()


def test_a_step_computes_what_plain_lora_of_the_active_ranks_does() -> None:
    model = wrapped(max_rank=8, ranks={QUERY: 3, WIDE: 6})
    plain = get_peft_model(tiny_bert(), model.peft_config["default"]).eval()
    assert operations(model) == operations(plain)


def test_memory_for_the_backward_pass_follows_the_active_rank() -> None:
    """What autograd keeps beside parameters: inputs, and the r numbers a token between A and B."""

    def retained(rank: int) -> int:
        model = wrapped(max_rank=8, ranks=dict.fromkeys([QUERY, WIDE], rank))
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            backward(model)
        return sum(storages.values())

    assert retained(1) < retained(4) < retained(8)
