"""The oracles against closed forms and against each other; and the tiny models they run on."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import collate, lora, samples, tiny_bert
from oracles import (
    SlowScores,
    slow_importance,
    slow_scores,
    slow_sensitivity,
)
from scoring import cross_entropy, lora_layers, squared_error, trainable

Build = Callable[..., PreTrainedModel]


class Affine(nn.Module):
    """Wx + b under the keyword x, `times` times; a plain tensor comes out."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, times: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.linear(x)
        return x


def rows_of_one(n: int) -> list[dict[str, Tensor]]:
    return [collate([row]) for row in samples(n, 3)]


def points(n: int, inputs: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, dtype=torch.float64, generator=generator)
    y = torch.randn(n, dtype=torch.float64, generator=generator)
    return x, y, [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(n)]


def assert_scores_equal(left: SlowScores, right: SlowScores, rtol: float = 1e-9) -> None:
    for term in ("loss", "gradient_norm", "loss_reduction", "convergence"):
        torch.testing.assert_close(getattr(left, term), getattr(right, term), rtol=rtol, atol=1e-11)
    assert left.eta == pytest.approx(right.eta, rel=rtol)
    assert left.reference_norm == pytest.approx(right.reference_norm, rel=rtol)


# --- scores -------------------------------------------------------------------------------


def test_scores_of_linear_regression_have_their_closed_form() -> None:
    model = Affine(3, 1, bias=False)
    x, y, batches = points(5, 3)
    error = x @ model.linear.weight.detach()[0] - y
    gradient = 2 * error[:, None] * x
    reference = [0, 2, 3]
    theta = dict(model.named_parameters())
    result = slow_scores(model, batches, sample_loss=squared_error, theta=theta, reference=reference)

    eta = float(0.5 * (error[reference] ** 2).sum() / (gradient[reference] ** 2).sum())
    after = error * (1 - 2 * eta * x.square().sum(dim=1))
    norm = gradient[reference].mean(dim=0).norm()
    others = [[j for j in reference if j != i] for i in range(5)]
    convergence = [gradient[i] @ gradient[others[i]].mean(dim=0) / norm for i in range(5)]
    expected = SlowScores(
        loss=error**2,
        gradient_norm=gradient.norm(dim=1),
        loss_reduction=error**2 - after**2,
        convergence=torch.stack(convergence),
        eta=eta,
        reference_norm=float(norm),
    )
    assert_scores_equal(result, expected)


def test_gradient_norm_of_a_softmax_layer_is_the_norm_of_p_minus_y_times_that_of_x() -> None:
    model = Affine(4, 3)
    x, _, batches = points(4, 4)
    labels = torch.tensor([0, 1, 2, 2])
    for i, batch in enumerate(batches):
        batch["labels"] = labels[i : i + 1]
    offsets = torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64)
    theta = dict(model.named_parameters())
    result = slow_scores(model, batches, sample_loss=cross_entropy, theta=theta, reference=[0, 1], offsets=offsets)
    logits = model(x).detach() + offsets
    miss = (logits.softmax(dim=1) - F.one_hot(labels, 3)).norm(dim=1)
    torch.testing.assert_close(result.gradient_norm, miss * (x.square().sum(dim=1) + 1).sqrt())
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, labels, reduction="none"))


def test_loss_reduction_tends_to_eta_times_the_squared_norm_and_the_default_eta_is_larger() -> None:
    model = lora(tiny_bert())
    batches, theta = rows_of_one(6), trainable(model)
    for eta, low, high in ((1e-6, 0.0, 1e-3), (None, 0.01, math.inf)):
        result = slow_scores(model, batches, sample_loss=cross_entropy, theta=theta, reference=range(6), eta=eta)
        curvature = (result.loss_reduction / (result.eta * result.gradient_norm**2) - 1).abs()
        assert bool(((low <= curvature) & (curvature <= high)).all())


def test_a_wrong_effective_weight_is_noticed() -> None:
    model = lora(tiny_bert())
    with pytest.raises(ValueError, match="effective weight"):
        slow_sensitivity(
            model,
            rows_of_one(1),
            sample_loss=cross_entropy,
            layers=lora_layers(model),
            effective_weight=lambda layer: layer.get_base_layer().weight,
        )


# --- sensitivity --------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "outputs"), [(1, 1), (2, 3)])
def test_sensitivity_of_a_linear_layer_is_the_mean_of_w_times_the_sum_of_its_gradients(
    times: int, outputs: int
) -> None:
    model = Affine(3, outputs, times=times)
    _, _, batches = points(4, 3)
    loss = squared_error if outputs == 1 else lambda logits, labels: squared_error(logits.sum(1), labels)
    layers = {"linear": model.linear}
    result = slow_sensitivity(
        model, batches, sample_loss=loss, layers=layers, effective_weight=lambda layer: layer.weight
    )
    weight, total = model.linear.weight, torch.zeros(outputs, 3, dtype=torch.float64)
    for batch in batches:
        (gradient,) = torch.autograd.grad(loss(model(batch["x"]), batch["labels"]).sum(), weight)
        total += (weight * gradient).abs().detach() / 4
    assert result == {"linear": pytest.approx(float(total.mean()))}


# --- calibration --------------------------------------------------------------------------


# --- sampling, optimizer, importance ------------------------------------------------------


def test_importance_of_two_steps_by_hand_and_of_a_constant_which_is_certain() -> None:
    # β = 0.5, I = 1 then 4.  Step 1: Ī 0.5, Î 1, Ū 0.  Step 2: Ī 2.25, Î 3, Ū 0.5, Û 2/3.
    result = slow_importance([torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])], 0.5)
    torch.testing.assert_close(result, torch.tensor([2.0, 0.0]))
    result = slow_importance([torch.tensor([0.25, 0.75], dtype=torch.float64)] * 3, 0.85)
    torch.testing.assert_close(result, torch.zeros(2, dtype=torch.float64))


# --- the tiny models ----------------------------------------------------------------------
