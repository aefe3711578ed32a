"""What tests of baselines share: a tiny pretrained model, a setup, a run in a stock Trainer."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from models import collate, tiny_bert
from stock import VOCAB, make_trainer, moods
from tsqlora.baselines import BASELINES, Built, Setup
from tsqlora.training.load import Pretrained

STEPS = 48
HEAD = ("classifier",)


def base(**options: Any) -> BertForSequenceClassification:
    return tiny_bert(
        **({"num_labels": 2, "layers": 1, "intermediate": 24, "vocab": VOCAB, "dtype": torch.float32} | options)
    )


def make_setup(model: Any = None, **changes: Any) -> Setup:
    options: dict[str, Any] = {
        "pretrained": Pretrained(base() if model is None else model, cast(Any, None), HEAD),
        "mean_rank": 4,
        "alpha": 16.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "steps": STEPS,
        "seed": 0,
    }
    return Setup(**(options | changes))


def build(name: str, model: Any = None, **changes: Any) -> Built:
    return BASELINES[name](make_setup(model, **changes))


def trainer_of(built: Built, folder: Path, *also: TrainerCallback, **options: Any) -> Trainer:
    """`also` come after the method's own callbacks."""
    further = {"max_steps": STEPS, "learning_rate": 0.02} | options
    trainer = make_trainer(cast(Any, built.model), moods(), folder, [*built.callbacks, *also], **further)
    trainer.loss_is_scaled_for_ga = False
    return trainer


def logits_of(model: nn.Module) -> torch.Tensor:
    batch = collate(moods(16, seed=3))
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits
