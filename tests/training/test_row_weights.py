"""Rows' weights in the stock Trainer against a loss in which they are written out."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import tsqlora as tsq
from models import collate, lora, samples, tiny_bert, tiny_llama_classifier
from stock import make_trainer, moods, slotted_bert
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.training.infobatch_callback import InfoBatchCallback
from tsqlora.training.row_weights import RowWeights

ROWS = 24
BATCH = 4
PER_ROW = np.random.default_rng(3).uniform(0.1, 4.0, size=ROWS)


class Weigh(TrainerCallback):
    """Nothing but RowWeights, and the gradient of the first optimizer step."""

    def __init__(self, data: tsq.QualitySubset) -> None:
        self.weights = RowWeights(data, "Weigh")
        self.grads: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.begin(args, kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.start(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.end()


def subset_of(rows: Any, weights: Any = PER_ROW) -> tsq.QualitySubset:
    """All rows in an order of their own, with these weights."""
    data = tsq.QualitySubset(rows, 1.0)
    order = np.random.default_rng(0).permutation(len(rows))
    data.policy = lambda _: (order, None if weights is None else weights[order])
    data.set_epoch(0)
    return data


def model_of(build: Callable[..., Any], num_labels: int = 3) -> Any:
    """Without dropout."""
    model = lora(build(num_labels, dtype=torch.float32))
    modules: Any = model.modules()
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def train(
    folder: Path, model: Any, data: tsq.QualitySubset, *also: TrainerCallback, **further: Any
) -> tuple[Weigh, Trainer]:
    weigh = Weigh(data)
    options = {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "max_grad_norm": 0.0} | further
    trainer = make_trainer(model, data, folder, [weigh, *also], **options)
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
    return weigh, trainer


def written_out(model: Any, data: tsq.QualitySubset, loss: Any, *, batches: int, bf16: bool, clip: float) -> Any:
    """The gradient of Σ w ℓ / n, of the mean over the batches of a step."""
    assert data.weights is not None
    for at in range(0, batches * BATCH, BATCH):
        inputs = collate([data.dataset[row] for row in data.indices[at : at + BATCH]])
        labels = inputs.pop("labels")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits
        weights = torch.as_tensor(data.weights[at : at + BATCH])
        ((loss(logits.float(), labels) * weights).sum() / BATCH / batches).backward()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    if clip:
        nn.utils.clip_grad_norm_(list(trained.values()), clip)
    return {n: p.grad for n, p in trained.items()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def assert_same_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor], error: float) -> None:
    assert found.keys() == wanted.keys()
    left, right = (torch.cat([grads[n].flatten() for n in wanted]) for grads in (found, wanted))
    assert float((left - right).norm()) < error * float(right.norm())


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama_classifier])
@pytest.mark.parametrize(
    ("batches", "bf16", "clip"), [(1, False, 0.0), (3, False, 0.0), (3, False, 0.1), (1, True, 0.0), (2, True, 0.1)]
)
def test_the_gradient_is_that_of_the_weighted_loss(
    build: Callable[..., Any], batches: int, bf16: bool, clip: float, tmp_path: Path
) -> None:
    data = subset_of(samples(ROWS, 3))
    further = {"gradient_accumulation_steps": batches, "bf16": bf16, "max_grad_norm": clip}
    weigh, _ = train(tmp_path, model_of(build), data, **further)
    wanted = written_out(model_of(build), data, cross_entropy, batches=batches, bf16=bf16, clip=clip)
    assert_same_gradient(weigh.grads, wanted, error=1e-2 if bf16 else 1e-5)
    if clip:
        assert torch.cat([g.flatten() for g in weigh.grads.values()]).norm() < 1.01 * clip


def test_regression(tmp_path: Path) -> None:
    data = subset_of(samples(ROWS, 1, regression=True))
    weigh, _ = train(tmp_path, model_of(tiny_bert, 1), data)
    squared = lambda z, y: (z.squeeze(1) - y).square()  # noqa: E731
    wanted = written_out(model_of(tiny_bert, 1), data, squared, batches=1, bf16=False, clip=0.0)
    assert_same_gradient(weigh.grads, wanted, error=1e-5)


def test_decimal_labels_are_those_of_the_batch(tmp_path: Path) -> None:
    """3.8 in float32 is no 3.8 in float64."""
    rows = [row | {"labels": round(0.1 * j, 1)} for j, row in enumerate(samples(ROWS, 1, regression=True))]
    weigh, _ = train(tmp_path, model_of(tiny_bert, 1), subset_of(rows))
    assert weigh.grads


def test_a_smoothed_loss(tmp_path: Path) -> None:
    data = subset_of(samples(ROWS, 3))
    weigh, _ = train(tmp_path, model_of(tiny_bert), data, label_smoothing_factor=0.2)
    smoothed = lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.2)  # noqa: E731
    wanted = written_out(model_of(tiny_bert), data, smoothed, batches=1, bf16=False, clip=0.0)
    assert_same_gradient(weigh.grads, wanted, error=1e-5)


def test_an_evaluation_within_the_epoch_takes_no_rows(tmp_path: Path) -> None:
    data = subset_of(samples(ROWS, 3))
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "evaluate_on": data.dataset}
    trainer = make_trainer(model_of(tiny_bert), data, tmp_path, [Weigh(data)], num_train_epochs=2, **evaluation)
    trainer.train()
    assert trainer.state.global_step == 2 * ROWS // 8


def test_without_weights_training_is_bit_for_bit_what_it_is(tmp_path: Path) -> None:
    ended = []
    for weighed in (True, False):
        data = subset_of(moods(), weights=None)
        trainer = make_trainer(slotted_bert(), data, tmp_path, [Weigh(data)] if weighed else [], num_train_epochs=2)
        trainer.train()
        ended.append(trainer.model.state_dict())  # type: ignore[union-attr]
    for name, value in ended[0].items():
        assert torch.equal(value, ended[1][name]), name


class WrittenOut(TrainerCallback):
    """At each step the gradient of the weighted loss, on a copy of the model, beside the one that training has."""

    def __init__(self, data: tsq.QualitySubset) -> None:
        self.data, self.copy, self.place, self.steps = data, None, 0, 0
        self.weighted = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.copy = slotted_still()
        self.copy.load_state_dict(kwargs["model"].state_dict())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        here = slice(self.place, self.place + 8)
        self.place += 8
        inputs = collate([self.data.dataset[row] for row in self.data.indices[here]])
        labels = inputs.pop("labels")
        losses = cross_entropy(self.copy(**inputs).logits, labels)  # type: ignore[misc]
        weights = self.data.weights
        if weights is not None:
            self.weighted += 1
            losses = losses * torch.as_tensor(weights[here])
        losses.mean().backward()
        mine: Any = self.copy
        wanted = {n: p.grad for n, p in mine.named_parameters() if p.grad is not None}
        found = {n: p.grad for n, p in kwargs["model"].named_parameters() if p.grad is not None}
        assert_same_gradient(found, wanted, error=1e-5)
        self.steps += 1


def slotted_still() -> Any:
    model = slotted_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def unbiased(data: tsq.QualitySubset) -> TrainerCallback:
    weights = {"convergence": 1.0, "gradient_norm": -1.0}
    return tsq.QualityCallback(data, reference=40, weights=weights, unbiased=True, guard=False)


@pytest.mark.parametrize("callback", [unbiased, InfoBatchCallback])
def test_every_step_of_a_run_has_the_gradient_of_its_weighted_loss(
    callback: Callable[[tsq.QualitySubset], TrainerCallback], tmp_path: Path
) -> None:
    data = tsq.QualitySubset(moods(64), 0.5)
    check = WrittenOut(data)
    options = {"num_train_epochs": 5, "learning_rate": 0.02, "max_grad_norm": 0.0}
    made = make_trainer(slotted_still(), data, tmp_path, [callback(data), check], **options)
    made.train()
    assert (check.steps, check.weighted) == (20, 12)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class Fail(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise InterruptedError


def test_nothing_is_left_on_the_model_and_the_data_also_after_an_error(tmp_path: Path) -> None:
    model, data = model_of(tiny_bert), subset_of(samples(ROWS, 3))
    before = hooks_of(model)
    weigh, _ = train(tmp_path, model, data)
    assert hooks_of(model) == before
    assert not data._listeners
    weigh = Weigh(data)
    with pytest.raises(InterruptedError):
        make_trainer(model, data, tmp_path, [weigh, Fail()], num_train_epochs=1).train()
    weigh.weights.begin(make_trainer(model, data, tmp_path, []).args, model)  # as another train() does
    assert hooks_of(model) == before
    assert not data._listeners


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("args", "of", "error", "text"),
    [
        (
            {"dataloader_num_workers": 1},
            None,
            SettingsError,
            "Weigh must see which rows are handed out; set",
        ),
        ({"n_gpu": 2}, None, UnsupportedError, "2 GPUs in one process copy the model at each"),
        (
            {"torch_compile": True},
            None,
            UnsupportedError,
            "compiled code does not show Weigh the gradient at",
        ),
        ({}, compiled, UnsupportedError, "compiled code does not show Weigh the gradient at the logits; leave out"),
    ],
)
def test_what_hides_rows_or_logits_is_refused(args: Any, of: Any, error: type[Exception], text: str) -> None:
    given: Any = SimpleNamespace(**{"dataloader_num_workers": 0, "n_gpu": 1, "torch_compile": False} | args)
    model = nn.Linear(1, 1) if of is None else of(nn.Linear(1, 1))
    with pytest.raises(error, match=text):
        RowWeights(subset_of(samples(ROWS, 3)), "Weigh").begin(given, model)


class OwnLoss(Trainer):
    """A loss of the model's outputs that is not the mean of the task's."""

    of: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return type(self).of(model(**inputs, output_hidden_states=True), inputs["labels"])


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda out, y: F.cross_entropy(out.logits, y) + out.logits.mean(1).square().sum(), "off any multiple of the"),
        (
            lambda out, y: out.hidden_states[-1].square().mean(),
            "does not come by way of the model's logits, where Weigh",
        ),
    ],
)
def test_a_loss_that_is_no_mean_of_the_rows_own_is_refused(loss: Any, text: str, tmp_path: Path) -> None:
    data = subset_of(samples(ROWS, 3))
    made = make_trainer(model_of(tiny_bert), data, tmp_path, [Weigh(data)], num_train_epochs=1)
    made.__class__ = type("Own", (OwnLoss,), {"of": staticmethod(loss)})
    with pytest.raises(UnsupportedError, match=text):
        made.train()
    assert made.state.global_step <= 1


def test_rows_with_weights_are_not_harvested(tmp_path: Path) -> None:
    data = subset_of(moods(ROWS))
    with pytest.raises(
        UnsupportedError, match="HarvestCallback reads gradients of rows that count alike, and the rows"
    ):
        make_trainer(slotted_bert(), data, tmp_path, [tsq.HarvestCallback(data), Weigh(data)]).train()
