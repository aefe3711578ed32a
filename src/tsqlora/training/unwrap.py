"""The model inside what trains it: DistributedDataParallel, torch.compile."""

from typing import cast

import torch._dynamo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tsqlora import distributed


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose layers have the names that PEFT gave them."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = cast(nn.Module, model._orig_mod)
        elif type(model).__name__ == "DeepSpeedEngine":
            distributed.refuse_deepspeed(model)
        else:
            return model
