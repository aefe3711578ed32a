"""The orthogonality penalty weighs the same in every step, of however many batches the step is made."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel, TrainerCallback

from models import GENERATORS, collate
from setups import base, build, make_setup
from stock import VOCAB, moods
from tsqlora.baselines import BASELINES
from tsqlora.baselines.triplets import config_of
from tsqlora.errors import UnsupportedError
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import get_task
from tsqlora.training.fit import Inputs, Method, fit, training_arguments
from tsqlora.training.record import RunRecord

Rows = list[dict[str, Any]]
ROWS, EPOCHS = 24, 10
WEIGHTS = {"adalora": 0.5, "elalora": 0.1}


def texts(n: int) -> Rows:
    """Rows of one length, so that a mean over batches is one over tokens."""
    rng = random.Random(0)
    rows = [[rng.randrange(1, VOCAB) for _ in range(6)] for _ in range(n)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows]


KINDS: dict[str, tuple[str, Callable[[], PreTrainedModel], Callable[[int], Rows]]] = {
    "divided by the window": ("causal-lm", lambda: GENERATORS["llama"](), texts),
    "a mean over the batch": ("seq2seq", lambda: GENERATORS["bart"](), texts),
    "of classes": ("sequence-classification", base, moods),
}
"""By what a model's loss is: the task, the model, and rows."""


class Watch(TrainerCallback):
    """The penalty's weight in each step's forward passes, and the gradients of the first step."""

    def __init__(self, model: PeftModel) -> None:
        self.weights, self.gradients = list[list[float]](), dict[str, Tensor]()
        model.register_forward_pre_hook(lambda *_: self._forward(config_of(model).orth_reg_weight))

    def _forward(self, weight: float) -> None:
        if self.weights:  # else the loss is computed before the first step
            self.weights[-1].append(weight)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append([])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            parameters = kwargs["model"].named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def trained(name: str, kind: str, folder: Path, *, batch_size: int, window: int) -> Watch:
    """A training as `compare` makes it, without dropout."""
    task, make, rows = KINDS[kind]
    model, steps = make().float(), EPOCHS * -(-ROWS // (batch_size * window))
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    built = BASELINES[name](make_setup(model, steps=steps, mean_rank=2))
    watch = Watch(cast(PeftModel, built.model))
    args = training_arguments(
        folder,
        epochs=EPOCHS,
        learning_rate=1e-3,
        batch_size=batch_size,
        eval_batch_size=8,
        bf16=False,
        seed=0,
        further={
            "gradient_accumulation_steps": window,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_strategy": "no",
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
        },
    )
    fit(
        built.model,
        args,
        Method(QualitySubset(rows(ROWS), 1.0)),
        Inputs(get_task(task), cast(Any, None), collate, cast(Any, rows(8))),
        RunRecord("running", 0, task, None, {}, {}),
        also=(*built.callbacks, watch),
    )
    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_have_the_gradient_of_one(kind: str, tmp_path: Path) -> None:
    """Of all rows, so that their order does not matter."""
    one, four = (trained("adalora", kind, tmp_path, batch_size=ROWS // n, window=n).gradients for n in (1, 4))
    # While λ is 0 nothing but the penalty moves the vectors.
    assert all(grad.norm() > 1e-3 for name, grad in one.items() if "lora_A" in name or "lora_B" in name)
    assert one.keys() == four.keys()
    for name, expected in one.items():
        torch.testing.assert_close(four[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_step_of_fewer_batches_has_the_whole_penalty_too(name: str, tmp_path: Path) -> None:
    watch = trained(name, "divided by the window", tmp_path, batch_size=4, window=4)
    # Six batches an epoch: four, and the two that are left.
    assert watch.weights == [[WEIGHTS[name] / n] * n for n in (4, 2)] * EPOCHS


def test_a_model_to_whose_loss_peft_would_add_no_penalty_is_refused() -> None:
    class Unheard(BertForSequenceClassification):
        """Of no task by its name."""

    with pytest.raises(UnsupportedError, match="Unheard"):
        build("adalora", Unheard(base().config))
