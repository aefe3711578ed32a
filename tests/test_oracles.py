"""The oracles against closed forms and against each other; and the tiny models they run on."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import collate, lora, samples, tiny_bert, tiny_llama_classifier
from oracles import (
    SlowScores,
    slow_adamw_step,
    slow_calibration,
    slow_importance,
    slow_scores,
    slow_sensitivity,
    slow_successive_sampling,
)
from scoring import cross_entropy, effective_weight, lora_layers, squared_error, trainable

Build = Callable[..., PreTrainedModel]
BUILDS = pytest.mark.parametrize("build", [tiny_bert, tiny_llama_classifier])


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


def test_scores_depend_neither_on_order_nor_on_frozen_flags() -> None:
    model = lora(tiny_bert())
    batches, theta = rows_of_one(5), trainable(model)
    forward = slow_scores(model, batches, sample_loss=cross_entropy, theta=theta, reference=[0, 1, 4])
    for parameter in theta.values():
        parameter.requires_grad_(False)
    backward = slow_scores(model, batches[::-1], sample_loss=cross_entropy, theta=theta, reference=[0, 3, 4])
    for term in ("gradient_norm", "loss_reduction", "convergence"):
        torch.testing.assert_close(getattr(forward, term), getattr(backward, term).flip(0))


def test_a_parameter_under_two_names_counts_once_and_one_out_of_the_graph_not_at_all() -> None:
    model = Affine(3, 1)
    _, _, batches = points(3, 3)
    theta = dict(model.named_parameters())
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    once, twice, more = (
        slow_scores(model, batches, sample_loss=squared_error, theta=each, reference=[0, 1])
        for each in (theta, theta | {"tied": model.linear.weight}, theta | {"unused": unused})
    )
    assert_scores_equal(once, twice)
    assert_scores_equal(once, more)
    assert torch.equal(unused, torch.ones_like(unused))


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


@BUILDS
def test_sensitivity_of_adapted_layers_is_that_of_the_base_weight_times_the_effective_one(build: Build) -> None:
    """∇_W is the same for W as for W + s·BA, so the base weight's own gradient must agree."""
    model, batches = lora(build()), rows_of_one(3)
    layers = lora_layers(model)
    result = slow_sensitivity(
        model, batches, sample_loss=cross_entropy, layers=layers, effective_weight=effective_weight
    )
    model.eval()
    bases = [layer.get_base_layer().weight.requires_grad_(True) for layer in layers.values()]
    totals = [torch.zeros_like(base) for base in bases]
    for batch in batches:
        labels = batch.pop("labels")
        gradients = torch.autograd.grad(cross_entropy(model(**batch).logits, labels).sum(), bases)
        for total, layer, g in zip(totals, layers.values(), gradients, strict=True):
            total += (effective_weight(layer).detach() * g).abs() / len(batches)
    assert result == pytest.approx({name: float(t.mean()) for name, t in zip(layers, totals, strict=True)}, rel=1e-5)


# --- calibration --------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "lean"), [(2, 0.0), (3, 4.0), (6, -8.0)])
def test_calibrated_probabilities_average_to_the_class_frequencies(classes: int, lean: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(80, classes, dtype=torch.float64, generator=generator)
    logits[:, 0] += lean
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (80 - classes,), generator=generator)])
    offsets = slow_calibration(logits, labels)
    frequency = torch.bincount(labels, minlength=classes).double() / 80
    torch.testing.assert_close((logits + offsets).softmax(1).mean(0), frequency, atol=1e-7, rtol=0)
    assert float(offsets.sum()) == pytest.approx(0, abs=1e-12)
    # A lean of the model is taken out again.
    further = torch.linspace(-3, 3, classes, dtype=torch.float64)
    torch.testing.assert_close(offsets - slow_calibration(logits + further, labels), further, atol=1e-6, rtol=0)


# --- sampling, optimizer, importance ------------------------------------------------------


def test_successive_sampling_draws_ordered_pairs_as_often_as_it_should() -> None:
    p, trials = np.array([0.5, 0.3, 0.2, 0.0]), 4000
    rng = np.random.default_rng(0)
    drawn = [tuple(slow_successive_sampling(p, 2, rng)) for _ in range(trials)]
    for i, j in itertools.permutations(range(3), 2):
        expected = p[i] * p[j] / (1 - p[i])
        error = math.sqrt(expected * (1 - expected) / trials)
        assert abs(drawn.count((i, j)) / trials - expected) < 4 * error
    assert p.tolist() == [0.5, 0.3, 0.2, 0.0]
    assert sorted(slow_successive_sampling(np.array([1.0, 1e-6, 3.0]), 3, rng)) == [0, 1, 2]


def test_adamw_steps_are_those_of_torch() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], **settings)
    ours, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 5):
        theirs.grad = torch.sin(step * start)
        optimizer.step()
        ours, first, second = slow_adamw_step(ours, theirs.grad, first, second, step, **settings)
    torch.testing.assert_close(ours, theirs.detach())
    torch.testing.assert_close(second, optimizer.state[theirs]["exp_avg_sq"])


def test_importance_of_two_steps_by_hand_and_of_a_constant_which_is_certain() -> None:
    # β = 0.5, I = 1 then 4.  Step 1: Ī 0.5, Î 1, Ū 0.  Step 2: Ī 2.25, Î 3, Ū 0.5, Û 2/3.
    result = slow_importance([torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])], 0.5)
    torch.testing.assert_close(result, torch.tensor([2.0, 0.0]))
    result = slow_importance([torch.tensor([0.25, 0.75], dtype=torch.float64)] * 3, 0.85)
    torch.testing.assert_close(result, torch.zeros(2, dtype=torch.float64))


# --- the tiny models ----------------------------------------------------------------------


@pytest.mark.parametrize(("build", "tolerance"), [(tiny_bert, 1e-12), (tiny_llama_classifier, 1e-5)])
def test_padding_does_not_change_logits_of_the_tiny_models_and_dropout_does(build: Build, tolerance: float) -> None:
    model = lora(build())
    rows = samples(5, 3)
    batch = collate(rows, pad_to=20)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    together = model.eval()(**batch).logits
    separate = torch.cat([model(**collate([row])).logits for row in rows])
    torch.testing.assert_close(separate, together, atol=tolerance, rtol=0)
