"""A stock Trainer over a tiny wrapped BERT, on rows whose words decide the label."""

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from models import collate, tiny_bert
from tsqlora import paper

# Every Trainer begins with a garbage collection; going through all that was imported takes the longest of it.
gc.freeze()

QUIET: dict[str, Any] = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
QUIET |= {"use_cpu": True, "dataloader_pin_memory": False}
"""A Trainer's arguments that let it print nothing, nor look for a GPU."""
VOCAB = 40
ROWS = 64


def moods(n: int = ROWS, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of class 0 have low tokens, rows of class 1 high ones; learned within eight steps."""
    rng = random.Random(seed)
    rows = []
    for j in range(n):
        first = (1, 20)[j % 2]
        ids = [rng.randrange(first, first + 3) for _ in range(rng.randint(4, 8))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": j % 2})
    return rows


class At(TrainerCallback):
    """Calls `act(state, control, further)` at a moment, as "step_end", with what the Trainer hands out besides."""

    def __init__(self, moment: str, act: Callable[[Any, Any, dict[str, Any]], Any]) -> None:
        def call(_args: Any, state: Any, control: Any, **further: Any) -> None:
            act(state, control, further)

        setattr(self, f"on_{moment}", call)


def fails_at(moment: str, step: int, error: type[BaseException] = ZeroDivisionError) -> At:
    """Fail, the first time, where so many steps are done."""
    left = [step]

    def fail(state: Any, *_: Any) -> None:
        if state.global_step in left:
            left.remove(step)
            raise error

    return At(moment, fail)


def stops_at(step: int) -> At:
    """A user's own stop."""

    def stop(state: Any, control: Any, _: Any) -> None:
        control.should_training_stop |= state.global_step == step

    return At("step_end", stop)


class Falling:
    """A metric that is best at the first evaluation."""

    value = 1.0

    def __call__(self, _predictions: Any) -> dict[str, float]:
        self.value -= 0.01
        return {"falling": self.value}


class Poison(TrainerCallback):
    """In some steps, counted from 1, makes a loss or gradient not finite."""

    def __init__(self, *steps: int, what: str = "loss", value: float = torch.nan) -> None:
        self.steps, self.what, self.value, self.step = steps, what, value, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook = kwargs["model"].register_forward_hook(self._forward, with_kwargs=True, prepend=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()

    def _forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and self.step in self.steps):
            return
        if self.what == "loss":
            output["loss"] = output["loss"] + self.value  # its gradient alone would be finite
        else:
            weight = next(p for name, p in module.named_parameters() if self.what in name and p.requires_grad)
            output["loss"] = output["loss"] + (weight * 0.0).sum().sqrt()  # 0, of infinite slope


def base_bert() -> BertForSequenceClassification:
    return tiny_bert(num_labels=2, layers=1, hidden=8, intermediate=16, vocab=VOCAB, dtype=torch.float32)


def slotted_bert(*, mean_rank: float = 4, seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return paper.wrap(base_bert(), mean_rank=mean_rank, **options)


def make_trainer(
    model: PeftModel,
    data: Any,
    folder: Path,
    callbacks: list[TrainerCallback],
    *,
    evaluate_on: Any = None,
    compute_metrics: Any = None,
    optimizers: Any = (None, None),
    **further: Any,
) -> Trainer:
    options: dict[str, Any] = {"num_train_epochs": 6, "learning_rate": 0.03, "per_device_train_batch_size": 8}
    options |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "remove_unused_columns": False}
    args = TrainingArguments(output_dir=str(folder), **QUIET | options | further)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=evaluate_on,
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
        optimizers=optimizers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
