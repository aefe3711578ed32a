"""What tests of the callbacks share: rows that a tiny model learns at once, and the stock Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import tsqlora as tsq
from models import collate, tiny_bert
from slotted import wrapped


def learnable(n: int, num_labels: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose words come from their class's own part of the vocabulary."""
    rng = np.random.default_rng(seed)
    rows = []
    for j in range(n):
        label = j % num_labels
        words = rng.integers(1 + 20 * label, 21 + 20 * label, size=rng.integers(4, 9))
        rows.append({"input_ids": words.tolist(), "attention_mask": [1] * len(words), "labels": label})
    return rows


def model_to_train(**options: Any) -> PeftModel:
    """A wrapped tiny BERT of two classes in float32, its update zero as it is at the start of a run."""
    base = tiny_bert(num_labels=2, dtype=torch.float32)
    return wrapped(base, dtype=torch.float32, spread=0.0, **({"mean_rank": 3} | options)).train()


def trainer(
    model: PeftModel, data: Any, folder: Path, callbacks: Sequence[TrainerCallback], **arguments: Any
) -> Trainer:
    """The stock Trainer; seven steps of eight rows an epoch for 56 rows."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 6,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return Trainer(
        model,
        TrainingArguments(**(defaults | arguments)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        callbacks=list(callbacks),
    )


def weights(model: PeftModel) -> dict[str, Tensor]:
    """All that was trained, copied, under PEFT's names."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "lora_" in name or "modules_to_save" in name
    }


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Stop(TrainerCallback):
    """Ends the training at a step, as a crash after that step's checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


class Crash(TrainerCallback):
    """Raises when a step begins; nothing after it is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def quality(data: tsq.QualitySubset, **options: Any) -> tsq.QualityCallback:
    return tsq.QualityCallback(data, **({"warmup": 1.0, "reference": 56} | options))
