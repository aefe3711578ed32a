"""The contract with accelerate: a failure here says which of its interfaces has changed."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from tsqlora.libs.accelerate import inner_optimizer, loss_scale, row_sampler, says_out_of_memory


def test_the_optimizer_inside_accelerates_is_found() -> None:
    """`AcceleratedOptimizer.optimizer` and `.scaler`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    prepared = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert prepared is not optimizer
    assert inner_optimizer(prepared) is inner_optimizer(optimizer) is optimizer
    assert loss_scale(prepared) is loss_scale(optimizer) is None
    prepared.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert loss_scale(prepared) == 4.0


def test_the_sampler_of_batches_that_are_shared_out_is_found() -> None:
    """`BatchSamplerShard.batch_sampler`."""
    batches = BatchSampler(rows := SequentialSampler(range(8)), 2, False)
    for shared in (batches, BatchSamplerShard(batches, num_processes=2)):
        assert row_sampler(SimpleNamespace(batch_sampler=shared)) is rows


@pytest.mark.parametrize("text", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory"])
def test_errors_of_memory_are_known_by_their_text(text: str) -> None:
    assert says_out_of_memory(RuntimeError(text))
    assert not says_out_of_memory(RuntimeError("shapes differ"))
