"""A RankLoop over the tiny wrapped BERT, by the documented protocol: 30 steps, 5 an epoch of 8 rows each."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from models import collate
from slotted import trained
from stock import moods, slotted_bert
from tsqlora import paper

ROWS = moods(40)
STEPS = 30
PERIOD: dict[str, Any] = {"interval": 4, "schedule": paper.RankSchedule(moves=6)}


def batch(step: int, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
    rows = ROWS[8 * (step % 5) :][:8]
    return collate(rows[part * 8 // parts : (part + 1) * 8 // parts])


def certain(model: PeftModel) -> PeftModel:
    """Without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.0)


def one_step(
    ranks: paper.RankLoop, step: int, *, model: Any = None, parts: int = 1, again: bool = False, factor: float = 1.0
) -> None:
    """A step by the documented protocol; if `factor` makes its loss not finite, the optimizer does not step."""
    called = ranks.model if model is None else model
    for part in range(parts):
        if again or part == 0:
            ranks.before_forward()
        (called(**batch(step, part, parts)).loss * factor / parts).backward()
    ranks.before_optimizer_step()
    if math.isfinite(factor):
        ranks.optimizer.step()
    ranks.after_optimizer_step()
    ranks.optimizer.zero_grad()


def several_steps(ranks: paper.RankLoop, numbers: Iterable[int], **options: Any) -> None:
    for number in numbers:
        one_step(ranks, number, **options)


def begin(**further: Any) -> paper.RankLoop:
    model = certain(slotted_bert())
    return paper.RankLoop(model, adamw(model), STEPS, **(PERIOD | further))


def whole_run(*, also: Callable[[paper.RankLoop], None] = lambda _: None, **options: Any) -> paper.RankLoop:
    ranks = begin()
    for step in range(STEPS):
        one_step(ranks, step, **options)
        also(ranks)
    return ranks


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
