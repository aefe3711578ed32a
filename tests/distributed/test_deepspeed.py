"""DeepSpeed is not installed here: the message for its users is tested with the flags that it would set."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tsqlora as tsq
from scoring import quality_by
from stock import make_trainer, moods, slotted_bert
from tsqlora import paper

MESSAGES = {
    "ranks": r"DeepSpeed keeps gradients and moments .* set ranks\.policy: fixed",
    "quality": r"DeepSpeed has its own copy of the weights, .* tsqlora look CONFIG --out LOOK",
}


class DeepSpeedEngine(nn.Module):
    """What deepspeed.initialize makes of a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("half", ["ranks", "quality"])
def test_a_trainer_with_deepspeed_is_refused_at_the_start(half: str, tmp_path: Path) -> None:
    data = tsq.QualitySubset(moods(), fraction=0.5, seed=0)
    callbacks: dict[str, Any] = {"ranks": paper.RankCallback(interval=2), "quality": quality_by(data)}
    trainer = make_trainer(slotted_bert(), data, tmp_path, [callbacks[half]])
    # As TrainingArguments(deepspeed=...) and ACCELERATE_USE_DEEPSPEED set it.
    assert trainer.args.deepspeed_plugin is None
    trainer.args.deepspeed_plugin = object()
    with pytest.raises(tsq.UnsupportedError, match=MESSAGES[half]):
        trainer.train()


def test_a_loop_with_deepspeed_is_refused_at_the_start() -> None:
    model = slotted_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(tsq.UnsupportedError, match=MESSAGES["ranks"]):
        paper.RankLoop(DeepSpeedEngine(model), optimizer, 100)
