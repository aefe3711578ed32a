"""Checks of exactness on one batch, through `score` on small models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from models import collate as models_collate
from models import samples, tiny_bert
from oracles import slow_scores
from scoring import assert_agree, score_by, squared_error
from tsqlora import paper
from tsqlora.auditing.look import require_own_loss
from tsqlora.errors import UnsupportedError
from tsqlora.tasks import Task, task_of
from tsqlora.tasks.regression import Regression

N, TOKENS, WIDTH = 12, 6, 4


class Model(nn.Module):
    """x (n, t, i) -> logits (n, 1); a subclass says what happens between two linear layers."""

    def __init__(self, tokens: int = TOKENS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        self.tokens = tokens
        self.build()
        self.double()

    def build(self) -> None:
        pass

    def between(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(x).tanh().mean(1))


def rows_for(model: nn.Module, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Rows whose targets the model has nearly learned."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(N, tokens, WIDTH, generator=rng, dtype=torch.float64)
    noise = torch.randn(N, generator=rng, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        y = torch.cat([model(row[None]) for row in x])[:, 0]
    model.train()
    return [{"x": row, "labels": float(label)} for row, label in zip(x, y + 0.1 * y.std() * noise, strict=True)]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float64)
    return {"x": torch.stack([row["x"] for row in rows]), "labels": labels}


def score(model: nn.Module, *, task: Task | None = None, batch_size: int = 5, tokens: int = TOKENS) -> paper.Scores:
    task = Regression() if task is None else task
    how = {"reference": range(8), "task": task, "calibration": False, "batch_size": batch_size}
    return score_by(model, rows_for(model, tokens), collate, **how)


def assert_scored_as_the_twin(model: nn.Module) -> None:
    rows = rows_for(model)
    twin = slow_scores(
        model,
        [collate([row]) for row in rows],
        sample_loss=squared_error,
        theta=dict(model.named_parameters()),
        reference=range(8),
    )
    assert_agree(score(model), twin)


class CalledTwice(Model):
    def between(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).sin())


class TiedWeights(Model):
    def build(self) -> None:
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.linear.weight

    def between(self, x: Tensor) -> Tensor:
        return self.second(self.linear(x).sin())


class FourDimensions(Model):
    def between(self, x: Tensor) -> Tensor:
        return self.linear(x.unflatten(1, (2, -1))).flatten(1, 2)


class FusedOutput(Model):
    """The output is changed in place, and a call is thrown away."""

    def between(self, x: Tensor) -> Tensor:
        self.linear(x.flip(1))
        return F.relu_(self.linear(x).add_(x))


class Half(Model):
    """A layer that no loss reaches."""

    def build(self) -> None:
        self.unused = nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize("kind", [Model, CalledTwice, TiedWeights, FourDimensions, FusedOutput, Half])
def test_what_is_exact_is_scored_as_the_twin_does(kind: type[Model]) -> None:
    assert_scored_as_the_twin(kind())


class Functional(Model):
    """Its linear's weight is used by F.linear, so that the layer's own forward is not called."""

    def between(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight, self.linear.bias)


class PartlyFunctional(Model):
    def between(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0.1 * F.linear(x, self.linear.weight)


class Attention(Model):
    """nn.MultiheadAttention: its out_proj is a linear layer whose forward is not called."""

    def build(self) -> None:
        self.linear = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        for parameter in (self.linear.in_proj_weight, self.linear.in_proj_bias):
            parameter.requires_grad_(False)

    def between(self, x: Tensor) -> Tensor:
        return self.linear(x, x, x)[0]


class Orthogonal(Model):
    """The gradient of what is parametrised is not that of the weight."""

    def build(self) -> None:
        nn.utils.parametrizations.orthogonal(self.linear)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Functional, "linear"), (PartlyFunctional, "linear"), (Attention, "linear.out_proj"), (Orthogonal, "linear")],
)
def test_a_weight_used_behind_its_layers_back_is_refused_by_name(kind: type[Model], name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name} is used outside"):
        score(kind())


class TokensFirst(Model):
    def between(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Normed(Model):
    def build(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).mT).mT


class Centred(Model):
    """Couples the samples of a batch without a module to name."""

    def between(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - 0.3 * y.mean(0) if len(y) > 1 else y


class Noisy(Model):
    def between(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 + 0.2 * torch.randn_like(x))


class Detached(Model):
    """The trained weights do not reach the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class InBatch(Regression):
    """A loss that divides by the size of the batch."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) / len(labels)


class Reduced(Regression):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels)[:, None]


@pytest.mark.parametrize(
    ("kind", "task", "names"),
    [
        (TokensFirst, Regression(), "^linear is called on"),
        (Normed, Regression(), r"^norm \(BatchNorm1d\)"),
        (Centred, Regression(), "couples the samples"),
        (Model, InBatch(), "couples the samples"),
        (Noisy, Regression(), "two forward passes"),
        (Model, Reduced(), r"shape \(5, 1\)"),
        (Detached, Regression(), "every gradient of the reference is zero"),
    ],
)
@pytest.mark.parametrize("batch_size", [5, TOKENS], ids=["not square", "square"])
def test_models_and_losses_without_exact_gradients_are_refused(
    kind: type[Model], task: Task, names: str, batch_size: int
) -> None:
    with pytest.raises(UnsupportedError, match=names.replace("5", str(batch_size))):
        score(kind(), task=task, batch_size=batch_size)


def test_a_model_whose_forward_takes_no_labels_needs_no_task() -> None:
    model = Model()
    model.head = nn.Linear(WIDTH, 2, dtype=torch.float64)
    rows = rows_for(model)
    with torch.no_grad():
        model.head.weight.mul_(20)
        logits = model(torch.stack([row["x"] for row in rows]))
        model.head.bias.sub_(logits.mean(0))
        labels = (logits - logits.mean(0)).argmax(1)
    for row, label in zip(rows, labels, strict=True):
        row["labels"] = int(label)

    def collate_classes(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return collate(rows) | {"labels": torch.tensor([row["labels"] for row in rows])}

    scores = score_by(model, rows, collate_classes)
    assert np.isfinite(scores.quality).all()
    assert scores.strata is not None


def test_adaloras_penalty_is_no_part_of_the_models_own_loss() -> None:
    model = get_peft_model(
        tiny_bert(), AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=9, orth_reg_weight=5.0)
    )
    rows = models_collate(samples(4, 3))
    assert model.eval()(**rows).loss > model.get_base_model()(**rows).loss + 0.1
    require_own_loss(model, rows, task_of(model))
