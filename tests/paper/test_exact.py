"""Checks of exactness on one batch, through `score` on small models."""

from collections.abc import Callable, Sequence
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
    """x (n, t, i) -> logits (n, 1), with something between two linear layers."""

    def __init__(
        self, between: Callable[[Any, Tensor], Tensor] = lambda m, x: m.linear(x), change: Callable[[Any], Any] = id
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.between = between
        change(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, x).tanh().mean(1))


def rows_for(model: nn.Module) -> list[dict[str, Any]]:
    """Rows whose targets the model has nearly learned."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(N, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    noise = torch.randn(N, generator=rng, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        y = torch.cat([model(row[None]) for row in x])[:, 0]
    model.train()
    return [{"x": row, "labels": float(label)} for row, label in zip(x, y + 0.1 * y.std() * noise, strict=True)]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float64)
    return {"x": torch.stack([row["x"] for row in rows]), "labels": labels}


def score(model: nn.Module, *, task: Task | None = None, batch_size: int = 5) -> paper.Scores:
    how = {"reference": range(8), "task": task or Regression(), "calibration": False, "batch_size": batch_size}
    return score_by(model, rows_for(model), collate, **how)


def tied(model: Any) -> None:
    model.linear, model.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
    model.second.weight = model.linear.weight


def changed_in_place(model: Any, x: Tensor) -> Tensor:
    """The output is changed in place, and a call is thrown away."""
    model.linear(x.flip(1))
    return F.relu_(model.linear(x).add_(x))


def hooked(model: Any) -> None:
    model.linear.register_forward_hook(lambda _m, _args, y: 3 * y)
    model.linear.register_forward_pre_hook(lambda _m, args: (args[0].sin(),))


EXACT: dict[str, Callable[[], Model]] = {
    "plain": Model,
    "called twice": lambda: Model(lambda m, x: m.linear(m.linear(x).sin())),
    "tied": lambda: Model(lambda m, x: m.second(m.linear(x).sin()), tied),
    "4-D": lambda: Model(lambda m, x: m.linear(x.unflatten(1, (2, -1))).flatten(1, 2)),
    "one vector": lambda: Model(lambda m, x: m.linear(x.mean(1))[:, None]),
    "in place": lambda: Model(changed_in_place),
    "other tokens": lambda: Model(lambda m, x: torch.cat([m.linear(x), m.linear(x[:, :2]).sin()], dim=1)),
    "under other hooks": lambda: Model(change=hooked),
    "a layer that no loss reaches": lambda: Model(change=lambda m: setattr(m, "unused", nn.Linear(WIDTH, WIDTH))),
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_exact_is_scored_as_the_twin_does(kind: str) -> None:
    model = EXACT[kind]()
    batches, theta = [collate([row]) for row in rows_for(model)], dict(model.named_parameters())
    twin = slow_scores(model, batches, sample_loss=squared_error, theta=theta, reference=range(8))
    assert_agree(score(model), twin)


def attention(model: Any) -> None:
    """Its out_proj is a linear layer whose forward is not called."""
    model.linear = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
    for parameter in (model.linear.in_proj_weight, model.linear.in_proj_bias):
        parameter.requires_grad_(False)


def normed(model: Any) -> None:
    model.norm = nn.BatchNorm1d(WIDTH, affine=False)


def centred(model: Any, x: Tensor) -> Tensor:
    """Couples the samples of a batch without a module to name."""
    y = model.linear(x)
    return y - 0.3 * y.mean(0) if len(y) > 1 else y


class InBatch(Regression):
    """A loss that divides by the size of the batch."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) / len(labels)


class Reduced(Regression):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels)[:, None]


INEXACT: dict[str, tuple[Callable[[], Model], str]] = {
    "functional": (lambda: Model(lambda m, x: F.linear(x, m.linear.weight, m.linear.bias)), "^linear is used outside"),
    "partly functional": (
        lambda: Model(lambda m, x: m.linear(x) + 0.1 * F.linear(x, m.linear.weight)),
        "^linear is used outside",
    ),
    "attention": (lambda: Model(lambda m, x: m.linear(x, x, x)[0], attention), "^linear.out_proj is used"),
    "parametrised": (
        lambda: Model(change=lambda m: nn.utils.parametrizations.orthogonal(m.linear)),
        "^linear is used outside",
    ),
    "tokens first": (lambda: Model(lambda m, x: m.linear(x.transpose(0, 1)).transpose(0, 1)), "^linear is called on"),
    "normed": (lambda: Model(lambda m, x: m.norm(m.linear(x).mT).mT, normed), r"^norm \(BatchNorm1d\)"),
    "centred": (lambda: Model(centred), "couples the samples"),
    "noisy": (lambda: Model(lambda m, x: m.linear(x) * (1 + 0.2 * torch.randn_like(x))), "two forward passes"),
    "detached": (
        lambda: Model(change=lambda m: m.register_forward_hook(lambda _m, _x, logits: logits.detach())),
        "every gradient of the reference is zero",
    ),
}


@pytest.mark.parametrize("case", INEXACT)
def test_models_without_exact_gradients_are_refused(case: str) -> None:
    build, named = INEXACT[case]
    with pytest.raises(UnsupportedError, match=named):
        score(build(), batch_size=TOKENS)  # whose square inputs hide what is not first


@pytest.mark.parametrize(("task", "named"), [(InBatch(), "couples the samples"), (Reduced(), r"shape \(5, 1\)")])
def test_a_loss_that_is_not_one_for_each_sample_alone_is_refused(task: Task, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        score(Model(), task=task)


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
