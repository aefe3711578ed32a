import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from tsqlora.errors import TsqLoraError
from tsqlora.tasks.classification import Classification

PLAIN = Classification()
QUICK = settings(max_examples=60, deadline=None)
SEEDS, WIDTHS = st.integers(0, 2**32), st.integers(2, 7)
SCALES = st.sampled_from([0.01, 1.0, 10.0, 100.0])
SMOOTHINGS = st.sampled_from([0.0, 0.1])


def batch(seed: int, width: int, scale: float = 1.0, n: int = 30) -> tuple[Tensor, Tensor]:
    """Logits that lean to some classes, and labels in which some classes are rare or absent."""
    rng = torch.Generator().manual_seed(seed)
    lean = torch.randn(width, generator=rng, dtype=torch.float64)
    logits = scale * (lean + torch.randn(n, width, generator=rng, dtype=torch.float64))
    return logits, (width * torch.rand(n, generator=rng) ** 4).long()


def weighted(seed: int, width: int, smoothing: float = 0.0) -> Classification:
    weights = 0.1 + torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return Classification(label_smoothing=smoothing, class_weights=weights)


def test_the_mean_loss_is_torch_s_cross_entropy() -> None:
    logits, labels = batch(0, 4)
    for smoothing in (0.0, 0.1, 1.0):
        ours = Classification(label_smoothing=smoothing).loss(logits, labels)
        assert ours.shape == labels.shape
        torch.testing.assert_close(ours.mean(), F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_a_class_weight_multiplies_the_sample_s_loss() -> None:
    logits, labels = batch(0, 3)
    task = weighted(1, 3, smoothing=0.1)
    assert task.class_weights is not None
    smoothed = Classification(label_smoothing=0.1).loss(logits, labels)
    torch.testing.assert_close(task.loss(logits, labels), task.class_weights.double()[labels] * smoothed)


def test_a_loss_does_not_depend_on_its_batch() -> None:
    logits, labels = batch(0, 3)
    together = weighted(0, 3, 0.1).loss(logits, labels)
    alone = [weighted(0, 3, 0.1).loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_comes_out_has_the_dtype_that_goes_in(dtype: torch.dtype) -> None:
    logits, labels = batch(0, 3)
    assert weighted(0, 3).loss(logits.to(dtype), labels).dtype == dtype
    assert weighted(0, 3).offsets(logits.to(dtype), labels).dtype == dtype


def test_chance_is_the_logarithm_of_the_class_frequencies() -> None:
    chance = PLAIN.chance(torch.tensor([0, 2, 2, 2]), 4)
    assert torch.allclose(chance.exp(), torch.tensor([0.25, 0.0, 0.75, 0.0]).double(), atol=1e-11)
    assert torch.isfinite(chance).all()
    assert chance[1] == chance[3] == np.log(1e-12)


@given(SEEDS, WIDTHS, SMOOTHINGS, st.booleans())
@QUICK
def test_no_constant_beats_chance(seed: int, width: int, smoothing: float, has_weights: bool) -> None:
    other, labels = batch(seed, width)
    task = weighted(seed, width, smoothing) if has_weights else Classification(label_smoothing=smoothing)
    chance = task.chance(labels, width)
    least = task.loss(chance.expand(len(labels), -1), labels).mean()
    for constant in (other[0], chance + 0.01 * other[1], torch.zeros(width).double()):
        assert least <= task.loss(constant.expand(len(labels), -1), labels).mean() + 1e-9


@given(SEEDS, WIDTHS, SCALES)
@QUICK
def test_offsets_make_mean_probabilities_the_class_frequencies(seed: int, width: int, scale: float) -> None:
    logits, labels = batch(seed, width, scale)
    counts = torch.bincount(labels, minlength=width).double()
    present = counts > 0
    offsets = PLAIN.offsets(logits, labels)
    means = torch.softmax((logits + offsets)[:, present], dim=1).mean(0)
    torch.testing.assert_close(means, counts[present] / len(labels), atol=2e-8, rtol=0)
    assert (offsets[~present] == 0).all()
    assert abs(offsets[present].sum().item()) < 1e-8


@given(SEEDS, WIDTHS, SMOOTHINGS)
@QUICK
def test_with_offsets_the_loss_pulls_the_logits_nowhere_on_average(seed: int, width: int, smoothing: float) -> None:
    logits, labels = batch(seed, width)
    labels[:width] = torch.arange(width)
    task = weighted(seed, width, smoothing)
    shifted = (logits + task.offsets(logits, labels)).requires_grad_()
    (gradient,) = torch.autograd.grad(task.loss(shifted, labels).mean(), shifted)
    assert gradient.sum(0).abs().max() < 1e-7


@given(SEEDS, WIDTHS)
@QUICK
def test_a_lean_added_to_the_logits_is_taken_off_again(seed: int, width: int) -> None:
    logits, labels = batch(seed, width)
    labels[:width] = torch.arange(width)
    lean = 5 * torch.randn(width, generator=torch.Generator().manual_seed(seed)).double()
    straight = logits + PLAIN.offsets(logits, labels)
    torch.testing.assert_close(
        (logits + lean + PLAIN.offsets(logits + lean, labels)).softmax(1), straight.softmax(1), atol=1e-6, rtol=0
    )


def test_calibration_of_logits_that_are_not_finite_is_refused() -> None:
    logits, labels = batch(0, 3)
    logits[4, 1] = torch.nan
    with pytest.raises(TsqLoraError, match="not finite"):
        PLAIN.offsets(logits, labels)


def test_calibration_that_does_not_converge_is_refused() -> None:
    logits, labels = batch(0, 3, scale=1e6)
    with pytest.raises(TsqLoraError, match="calibration is off"):
        PLAIN.offsets(logits, labels)


def test_metrics_are_scikit_learn_s_by_their_plain_names() -> None:
    logits, labels = batch(3, 3, n=200)
    predicted = logits.argmax(1).numpy()
    task = weighted(0, 3)
    assert task.metrics(logits.numpy(), labels.numpy()) == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "matthews": matthews_corrcoef(labels, predicted),
            "loss": task.loss(logits, labels).mean().item(),
        }
    )


def test_metrics_of_constant_predictions_are_numbers_without_a_warning() -> None:
    logits, labels = np.array([[0.0, 1.0, 0.0]] * 3, dtype=np.float32), np.array([0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed = PLAIN.metrics(logits, labels)
        right = PLAIN.metrics(logits, np.array([1, 1, 1]))
    assert (mixed["matthews"], mixed["accuracy"]) == (0.0, pytest.approx(2 / 3))
    assert (right["matthews"], right["macro_f1"]) == (0.0, 1.0)
    assert all(type(value) is float for value in mixed.values())
