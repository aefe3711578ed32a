"""What tests of rank slots share: wrapped tiny models, ranks set by hand, optimizer steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from models import PAD, collate, samples, tiny_bert
from tsqlora import paper
from tsqlora.paper.change import drop_slots, grow_slot
from tsqlora.paper.slots import Slots, find_slots, sync_config

QUERY = "bert.encoder.layer.0.attention.self.query"
WIDE = "bert.encoder.layer.1.intermediate.dense"
POOLER = "bert.pooler.dense"
WORDS = "bert.embeddings.word_embeddings"
TYPES = "bert.embeddings.token_type_embeddings"
TARGETS = ["word_embeddings", "token_type_embeddings", "query"]
VOCAB = 60

OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "weight decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.05),
}


def wrapped(
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    **options: Any,
) -> PeftModel:
    """A wrapped model (a tiny BERT), B not zero, in eval mode; `ranks` says which layers differ from the mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        slotted = paper.wrap(tiny_bert(dtype=dtype) if model is None else model, **({"mean_rank": 4} | options))
        slotted.to(dtype)
        fill(slotted)
        resize(slotted, ranks or {})
    return slotted.eval()


def embedded(base: nn.Module | None = None, *, ranks: Mapping[str, int] | None = None, **options: Any) -> PeftModel:
    """LoRA over embeddings and one kind of linear layer, A and B not zero."""
    model = wrapped(base, ranks=ranks or {}, **{"target_modules": TARGETS} | options)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for slots in find_slots(model).values():
            slots.a[: slots.rank] = 0.3 * torch.randn(slots.rank, slots.shape[0])
            if slots.shape[0] == VOCAB:
                slots.a[:, PAD] = 0  # as it stays in training: PEFT's own is zero, and padding has no gradient
    return model


def fill(model: PeftModel) -> None:
    """Gives every active column of B some noise."""
    with torch.no_grad():
        for slots in find_slots(model).values():
            slots.b[:, : slots.rank] = 0.1 * torch.randn(slots.b.shape[0], slots.rank)


def resize(model: PeftModel, ranks: Mapping[str, int]) -> None:
    """Brings layers to these ranks, the last slots first; new ones have noise in both matrices."""
    for name, rank in ranks.items():
        slots = find_slots(model)[name]
        if slots.rank > rank:
            drop_slots(slots, list(range(rank, slots.rank)), None)
        while slots.rank < rank:
            grow_slot(slots, torch.randn(slots.shape[0]) / slots.shape[0] ** 0.5, None)
            with torch.no_grad():
                slots.b[:, slots.rank - 1] = 0.1 * torch.randn(slots.shape[1])
    sync_config(model)


def backward(model: nn.Module, rows: Sequence[dict[str, Any]] | None = None) -> None:
    """Gradients of the mean loss of some rows."""
    model.zero_grad()
    model(**collate(rows or samples(6, 3))).loss.backward()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        backward(model, samples(6, 3, seed=step))
        optimizer.step()


def hidden(slots: Slots, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """All numbers of slots that are not active: weights, gradients and moments."""
    result: list[Tensor] = []
    for parameter, dim in slots.matrices():
        state = {} if optimizer is None else optimizer.state[parameter]
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
        grads = [] if parameter.grad is None else [parameter.grad]
        for tensor in [parameter.detach(), *grads, *moments]:
            result.append(tensor.narrow(dim, slots.rank, slots.capacity - slots.rank))
    return result


def assert_hidden_are_zero(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    for slots in find_slots(model).values():
        assert all(not tensor.any() for tensor in hidden(slots, optimizer)), slots.name


def updates(model: nn.Module) -> dict[str, Tensor]:
    """ΔW = s·BA of every layer."""
    return {name: update(slots.layer, slots.adapter) for name, slots in find_slots(model).items()}


def update(layer: LoraLayer, adapter: str) -> Tensor:
    """PEFT's own ΔW."""
    return cast(Any, layer).get_delta_weight(adapter).detach().clone()
