"""The contract with accelerate: a failure here says which of its interfaces has changed."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from tsqlora.libs.accelerate import inner_batch_sampler, inner_optimizer, loss_scale, says_out_of_memory


def test_the_optimizer_inside_accelerates_is_found() -> None:
    """`AcceleratedOptimizer.optimizer` and `.scaler`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    prepared = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert prepared is not optimizer
    assert inner_optimizer(prepared) is inner_optimizer(optimizer) is optimizer
    assert loss_scale(prepared) is loss_scale(optimizer) is None
    prepared.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert loss_scale(prepared) == 4.0


def test_the_batch_sampler_that_is_shared_out_is_found() -> None:
    """`BatchSamplerShard.batch_sampler`."""
    batches = BatchSampler(SequentialSampler(range(8)), 2, False)
    assert inner_batch_sampler(BatchSamplerShard(batches, num_processes=2)) is batches
    assert inner_batch_sampler(batches) is batches


@pytest.mark.parametrize("text", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory"])
def test_errors_of_memory_are_known_by_their_text(text: str) -> None:
    assert says_out_of_memory(RuntimeError(text))
    assert not says_out_of_memory(RuntimeError("shapes differ"))
