"""The oracles against closed forms and against each other; and the tiny models they run on."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import collate, lora, samples, tiny_bert, tiny_llama_classifier
from oracles import (
    SampleLoss,
    SlowScores,
    slow_adamw_step,
    slow_calibration,
    slow_importance,
    slow_scores,
    slow_scores_full,
    slow_sensitivity,
    slow_successive_sampling,
)

Build = Callable[..., PreTrainedModel]
Run = Callable[[PeftModel, SampleLoss], None]


class Affine(nn.Module):
    """Wx + b under the keyword x; a plain tensor comes out."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Twice(Affine):
    """W(Wx): one layer called twice in a forward, without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.squeeze(-1) - labels) ** 2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def weight_of(layer: nn.Module) -> Tensor:
    if isinstance(layer, LoraLayer):
        return layer.get_base_layer().weight + layer.get_delta_weight("default")
    return layer.weight


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def head(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trainable(model).items() if "modules_to_save" in name}


def rows_of_one(n: int, num_labels: int, **options: Any) -> list[dict[str, Tensor]]:
    return [collate([row]) for row in samples(n, num_labels, **options)]


def points(n: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, dtype=torch.float64, generator=generator)
    y = torch.randn(n, dtype=torch.float64, generator=generator)
    return x, y, [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(n)]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that scoring must leave alone."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "frozen": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "random": torch.random.get_rng_state(),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = fingerprint(model)
    assert torch.equal(before.pop("random"), after.pop("random"))
    weights, weights_after = before.pop("weights"), after.pop("weights")
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)
    assert before == after


def assert_scores_equal(left: SlowScores, right: SlowScores, rtol: float = 1e-9) -> None:
    for term in ("loss", "gradient_norm", "loss_reduction", "convergence"):
        torch.testing.assert_close(getattr(left, term), getattr(right, term), rtol=rtol, atol=1e-11)
    assert left.eta == pytest.approx(right.eta, rel=rtol)
    assert left.reference_norm == pytest.approx(right.reference_norm, rel=rtol)


# --- scores -------------------------------------------------------------------------------


def test_scores_of_linear_regression_have_their_closed_form() -> None:
    model = Affine(3, 1, bias=False)
    x, y, batches = points(5, 3)
    w = model.linear.weight.detach()[0]
    error = x @ w - y
    gradient = 2 * error[:, None] * x
    reference = [0, 2, 3]

    found = slow_scores(
        model,
        batches,
        sample_loss=squared_error,
        theta=dict(model.named_parameters()),
        reference=reference,
    )

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
    assert_scores_equal(found, expected)


def test_gradient_norm_of_a_softmax_layer_is_the_norm_of_p_minus_y_times_that_of_x() -> None:
    model = Affine(4, 3)
    x, _, batches = points(4, 4)
    labels = torch.tensor([0, 1, 2, 2])
    for i, batch in enumerate(batches):
        batch["labels"] = labels[i : i + 1]
    offsets = torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64)

    found = slow_scores(
        model,
        batches,
        sample_loss=cross_entropy,
        theta=dict(model.named_parameters()),
        reference=[0, 1],
        offsets=offsets,
    )

    logits = model(x).detach() + offsets
    miss = (logits.softmax(dim=1) - F.one_hot(labels, 3)).norm(dim=1)
    with_bias = (x.square().sum(dim=1) + 1).sqrt()
    torch.testing.assert_close(found.gradient_norm, miss * with_bias)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels, reduction="none"))


def test_loss_reduction_tends_to_eta_times_the_squared_norm() -> None:
    model = lora(tiny_bert())
    found = slow_scores(
        model,
        rows_of_one(3, 3),
        sample_loss=cross_entropy,
        theta=trainable(model),
        reference=[0, 1, 2],
        eta=1e-6,
    )
    torch.testing.assert_close(
        found.loss_reduction / (found.eta * found.gradient_norm**2),
        torch.ones(3, dtype=torch.float64),
        rtol=1e-3,
        atol=0,
    )


def test_the_default_eta_is_large_enough_for_curvature_to_show() -> None:
    model = lora(tiny_bert())
    found = slow_scores(model, rows_of_one(6, 3), sample_loss=cross_entropy, theta=trainable(model), reference=range(6))
    first_order = found.eta * found.gradient_norm**2
    assert bool(((found.loss_reduction - first_order).abs() > 0.01 * first_order).all())


def test_scores_depend_neither_on_order_nor_on_frozen_flags() -> None:
    model = lora(tiny_bert())
    batches = rows_of_one(5, 3)
    theta = trainable(model)
    forward = slow_scores(model, batches, sample_loss=cross_entropy, theta=theta, reference=[0, 1, 4])
    for parameter in theta.values():
        parameter.requires_grad_(False)
    backward = slow_scores(model, batches[::-1], sample_loss=cross_entropy, theta=theta, reference=[0, 3, 4])
    torch.testing.assert_close(forward.gradient_norm, backward.gradient_norm.flip(0))
    torch.testing.assert_close(forward.loss_reduction, backward.loss_reduction.flip(0))
    torch.testing.assert_close(forward.convergence, backward.convergence.flip(0))


def test_a_parameter_under_two_names_counts_once() -> None:
    model = Affine(3, 1)
    _, _, batches = points(3, 3)
    once = dict(model.named_parameters())
    twice = once | {"tied": model.linear.weight}
    found = [
        slow_scores(model, batches, sample_loss=squared_error, theta=theta, reference=[0, 1]) for theta in (once, twice)
    ]
    assert_scores_equal(*found)


def test_a_parameter_out_of_the_graph_has_gradient_zero() -> None:
    model = Affine(3, 1)
    _, _, batches = points(3, 3)
    theta = dict(model.named_parameters())
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = [
        slow_scores(model, batches, sample_loss=squared_error, theta=each, reference=[0, 1])
        for each in (theta, theta | {"unused": unused})
    ]
    assert_scores_equal(*found)
    assert torch.equal(unused, torch.ones_like(unused))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([], "the reference has 0 rows; leave-one-out (eq. 3) needs 2"),
        ([1], "the reference has 1 rows; leave-one-out (eq. 3) needs 2"),
        ([1, 1], "the reference names a row twice; name each once"),
        ([0, 3], "the reference names [3], outside 0 to 2"),
    ],
)
def test_a_reference_without_a_meaning_is_refused(reference: list[int], message: str) -> None:
    model = Affine(3, 1)
    _, _, batches = points(3, 3)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (its text is compared below)
        slow_scores(
            model,
            batches,
            sample_loss=squared_error,
            theta=dict(model.named_parameters()),
            reference=reference,
        )
    assert str(caught.value) == message


# --- what is left behind ------------------------------------------------------------------


def run_scores(model: PeftModel, sample_loss: SampleLoss) -> None:
    # By name: some of it may be frozen.
    theta = {n: p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    slow_scores(model, rows_of_one(3, 3), sample_loss=sample_loss, theta=theta, reference=[0, 1])


def run_scores_full(model: PeftModel, sample_loss: SampleLoss) -> None:
    slow_scores_full(
        model,
        rows_of_one(3, 3),
        sample_loss=sample_loss,
        layers=lora_layers(model),
        effective_weight=weight_of,
        head=head(model),
        reference=[0, 1],
    )


def run_sensitivity(model: PeftModel, sample_loss: SampleLoss) -> None:
    slow_sensitivity(
        model,
        rows_of_one(3, 3),
        sample_loss=sample_loss,
        layers=lora_layers(model),
        effective_weight=weight_of,
    )


ALL_RUNS = pytest.mark.parametrize("run", [run_scores, run_scores_full, run_sensitivity])


@ALL_RUNS
def test_the_model_is_left_as_it_was(run: Run) -> None:
    model = lora(tiny_bert(dtype=torch.float32))
    model.get_submodule("base_model.model.bert.encoder.layer.0").eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = fingerprint(model)
    run(model, cross_entropy)
    assert_unchanged(before, model)


@ALL_RUNS
@pytest.mark.parametrize("calls_before", [0, 1, 2, 3])
def test_the_model_is_left_as_it_was_after_an_exception(run: Run, calls_before: int) -> None:
    model = lora(tiny_bert(dtype=torch.float32))
    before = fingerprint(model)
    calls = itertools.count()

    def failing(logits: Tensor, labels: Tensor) -> Tensor:
        # Call 3 is the first stepped pass of slow_scores; slow_sensitivity has three in all.
        if next(calls) == min(calls_before, 2 if run is run_sensitivity else 3):
            raise RuntimeError("the loss failed")
        return cross_entropy(logits, labels)

    with pytest.raises(RuntimeError, match="the loss failed"):
        run(model, failing)
    assert_unchanged(before, model)


# --- scope: full --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "head_name", "rtol"),
    [(tiny_bert, "classifier", 1e-9), (tiny_llama_classifier, "score", 1e-4)],
)
def test_full_scores_are_those_of_the_merged_model(build: Build, head_name: str, rtol: float) -> None:
    model = lora(build())
    batches = rows_of_one(4, 3)
    layers = lora_layers(model)
    found = slow_scores_full(
        model,
        batches,
        sample_loss=cross_entropy,
        layers=layers,
        effective_weight=weight_of,
        head=head(model),
        reference=[0, 1, 2],
    )

    prefix = "base_model.model."
    merged = copy.deepcopy(model).merge_and_unload()
    targets = {f"{name.removeprefix(prefix)}.weight" for name in layers}
    theta = {
        name: parameter
        for name, parameter in merged.named_parameters()
        if name in targets or name.startswith(head_name)
    }
    assert len(theta) == len(layers) + len(head(model))
    expected = slow_scores(merged, batches, sample_loss=cross_entropy, theta=theta, reference=[0, 1, 2])
    assert_scores_equal(found, expected, rtol)


def test_a_wrong_effective_weight_is_noticed() -> None:
    model = lora(tiny_bert())
    with pytest.raises(ValueError, match="and its effective weight differ by"):
        slow_sensitivity(
            model,
            rows_of_one(1, 3),
            sample_loss=cross_entropy,
            layers=lora_layers(model),
            effective_weight=lambda layer: layer.get_base_layer().weight,
        )


# --- sensitivity --------------------------------------------------------------------------


def test_sensitivity_of_a_linear_layer_is_the_mean_of_w_times_g() -> None:
    model = Affine(3, 1)
    x, y, batches = points(4, 3)
    found = slow_sensitivity(
        model,
        batches,
        sample_loss=squared_error,
        layers={"linear": model.linear},
        effective_weight=weight_of,
    )
    w = model.linear.weight.detach()
    gradient = 2 * (model(x).detach() - y[:, None]) * x
    assert found == {"linear": pytest.approx(float((w * gradient).abs().mean()))}


def test_sensitivity_of_a_layer_called_twice_uses_the_sum_of_its_gradients() -> None:
    model = Twice(3)
    x, _, _ = points(1, 3)
    batch = {"x": x, "labels": torch.tensor([1])}
    found = slow_sensitivity(
        model,
        [batch],
        sample_loss=cross_entropy,
        layers={"linear": model.linear},
        effective_weight=weight_of,
    )
    (gradient,) = torch.autograd.grad(cross_entropy(model(x), batch["labels"]).sum(), model.linear.weight)
    assert found["linear"] == pytest.approx(float((model.linear.weight * gradient).abs().mean().detach()))


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama_classifier])
def test_sensitivity_of_adapted_layers_is_that_of_the_base_weight_times_the_effective_one(
    build: Build,
) -> None:
    """∇_W is the same for W as for W + s·BA, so the base weight's own gradient must agree."""
    model = lora(build())
    batches = rows_of_one(3, 3)
    layers = lora_layers(model)
    found = slow_sensitivity(model, batches, sample_loss=cross_entropy, layers=layers, effective_weight=weight_of)

    model.eval()
    bases = [layer.get_base_layer().weight.requires_grad_(True) for layer in layers.values()]
    totals = [torch.zeros_like(base) for base in bases]
    for batch in batches:
        loss = cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
        )
        for total, layer, g in zip(totals, layers.values(), torch.autograd.grad(loss.sum(), bases), strict=True):
            total += (weight_of(layer).detach() * g).abs() / len(batches)
    assert found == pytest.approx({name: float(t.mean()) for name, t in zip(layers, totals, strict=True)}, rel=1e-5)


def test_a_layer_named_twice_is_refused() -> None:
    model = Affine(3, 1)
    with pytest.raises(ValueError, match="a layer is named twice; name each once"):
        slow_sensitivity(
            model,
            points(1, 3)[2],
            sample_loss=squared_error,
            layers={"a": model.linear, "b": model.linear},
            effective_weight=weight_of,
        )


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


def test_calibration_takes_a_lean_of_the_model_out_again() -> None:
    logits = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 3
    lean = torch.tensor([3.0, -1.0, -2.0], dtype=torch.float64)
    difference = slow_calibration(logits, labels) - slow_calibration(logits + lean, labels)
    torch.testing.assert_close(difference, lean, atol=1e-6, rtol=0)


def test_calibration_refuses_a_class_without_a_label() -> None:
    with pytest.raises(ValueError, match="for 3 classes; each must occur, and no other"):
        slow_calibration(torch.zeros(2, 3), torch.tensor([0, 1]))


# --- sampling, optimizer, importance ------------------------------------------------------


def test_successive_sampling_draws_ordered_pairs_as_often_as_it_should() -> None:
    p = np.array([0.5, 0.3, 0.2, 0.0])
    rng = np.random.default_rng(0)
    trials = 4000
    drawn = [tuple(slow_successive_sampling(p, 2, rng)) for _ in range(trials)]
    for i, j in itertools.permutations(range(3), 2):
        expected = p[i] * p[j] / (1 - p[i])
        error = math.sqrt(expected * (1 - expected) / trials)
        assert abs(drawn.count((i, j)) / trials - expected) < 4 * error
    assert p.tolist() == [0.5, 0.3, 0.2, 0.0]


def test_successive_sampling_of_all_is_a_permutation() -> None:
    drawn = slow_successive_sampling(np.array([1.0, 1e-6, 3.0]), 3, np.random.default_rng(0))
    assert sorted(drawn) == [0, 1, 2]


def test_successive_sampling_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot draw 3 from 2 with a probability above 0"):
        slow_successive_sampling(np.array([0.5, 0.5, 0.0]), 3, np.random.default_rng(0))


def test_adamw_steps_are_those_of_torch() -> None:
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
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


def test_importance_of_two_steps_by_hand() -> None:
    # β = 0.5, I = 1 then 4.  Step 1: Ī 0.5, Î 1, Ū 0.  Step 2: Ī 2.25, Î 3, Ū 0.5, Û 2/3.
    found = slow_importance([torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])], 0.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0]))


def test_importance_of_a_constant_is_zero_since_nothing_is_uncertain() -> None:
    found = slow_importance([torch.tensor([0.25, 0.75], dtype=torch.float64)] * 3, 0.85)
    torch.testing.assert_close(found, torch.zeros(2, dtype=torch.float64))


def test_importance_needs_a_step() -> None:
    with pytest.raises(ValueError, match="no step was given; importance needs one"):
        slow_importance([], 0.85)


# --- the tiny models ----------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama_classifier])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_are_seeded_and_leave_the_random_state_alone(build: Build, dtype: torch.dtype) -> None:
    state = torch.random.get_rng_state()
    one, same, other = lora(build(dtype=dtype)), lora(build(dtype=dtype)), lora(build(dtype=dtype, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert {p.dtype for p in one.parameters()} == {dtype}
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    pairs = zip(one.base_model.parameters(), other.base_model.parameters(), strict=True)
    assert not all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize(("build", "tolerance"), [(tiny_bert, 1e-12), (tiny_llama_classifier, 1e-5)])
def test_padding_does_not_change_logits_of_the_tiny_models(build: Build, tolerance: float) -> None:
    model = lora(build()).eval()
    rows = samples(5, 3)
    batch = collate(rows, pad_to=20)
    del batch["labels"]
    together = model(**batch).logits
    for i, row in enumerate(rows):
        alone = collate([row])
        del alone["labels"]
        torch.testing.assert_close(model(**alone).logits[0], together[i], atol=tolerance, rtol=0)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama_classifier])
def test_dropout_is_on_in_train_mode(build: Build) -> None:
    model = build()
    batch = collate(samples(4, 3))
    assert model.training
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("build", "head_names"), [(tiny_bert, ["weight", "bias"]), (tiny_llama_classifier, ["weight"])]
)
def test_lora_gives_every_trained_matrix_a_gradient(build: Build, head_names: list[str]) -> None:
    model = lora(build(), dropout=0.0)
    model(**collate(samples(6, 3))).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable(model).values())
    assert [name.rsplit(".", 1)[1] for name in head(model)] == head_names
    assert not any("classifier" in name or "score" in name for name in lora_layers(model))


def test_lora_takes_targets_and_modules_to_save() -> None:
    model = lora(tiny_bert(layers=1), r=2, targets=["query"], modules_to_save=["classifier"], alpha=6)
    (layer,) = lora_layers(model).values()
    assert layer.r == {"default": 2}
    assert layer.scaling == {"default": 3.0}


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama_classifier])
def test_models_take_one_label_as_regression(build: Build) -> None:
    model = build(num_labels=1, problem_type="regression")
    batch = collate(samples(4, 1, regression=True), label_dtype=torch.float64)
    assert model(**batch).logits.shape == (4, 1)
    assert model(**batch).loss.ndim == 0


def test_samples_are_seeded_mixed_in_length_and_hold_every_class() -> None:
    rows = samples(30, 4, lengths=(2, 9), seed=3)
    assert rows == samples(30, 4, lengths=(2, 9), seed=3)
    assert rows != samples(30, 4, lengths=(2, 9), seed=4)
    assert {len(row["input_ids"]) for row in rows} == set(range(2, 10))
    assert {row["labels"] for row in rows} == set(range(4))
    assert all(0 < token < 60 for row in rows for token in row["input_ids"])
    assert all(isinstance(row["labels"], float) for row in samples(3, 1, regression=True))


def test_collate_pads_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": 2},
        {"input_ids": [7], "attention_mask": [1], "labels": 0},
    ]
    batch = collate(rows, pad_to=3)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert collate(rows)["input_ids"].shape == (2, 2)
    with pytest.raises(ValueError, match="a row has 2 tokens, more than pad_to=1"):
        collate(rows, pad_to=1)
