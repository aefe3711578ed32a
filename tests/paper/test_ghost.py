"""Both forms of a per-sample gradient against the matrix bᵀa itself."""

from unittest import mock

import pytest
import torch
from beartype.roar import BeartypeException
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from tsqlora.paper import ghost
from tsqlora.paper.ghost import (
    Explicit,
    Factored,
    LookupGradient,
    MeanGradient,
    layer_gradient,
    summed_gradient,
    weight_gradient,
)
from tsqlora.paper.sites import is_embedding

SHAPES = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
SEEDS = st.integers(0, 2**32)


def pair(shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    n, t, i, o = shape
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(n, t, i, generator=rng, dtype=torch.float64)
    return a.to(dtype), torch.randn(n, t, o, generator=rng, dtype=torch.float64).to(dtype)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@given(SHAPES, SEEDS)
def test_both_forms_are_the_matrix(shape: tuple[int, int, int, int], seed: int) -> None:
    a, b = pair(shape, seed)
    n, t, i, o = shape
    matrix = b.mT @ a
    x, other = pair((n, t + 1, i, o), seed + 1)[0], torch.randn(o, i, dtype=torch.float64)
    for form in (Explicit(matrix), Factored(a, b)):
        close(form.norm_sq(), matrix.square().sum((1, 2)))
        close(form.dot(other), (matrix * other).sum((1, 2)))
        close(form.apply(x), torch.einsum("nti,noi->nto", x, matrix))


@given(SHAPES, SEEDS, st.integers(1, 60))
def test_long_samples_are_taken_in_parts(shape: tuple[int, int, int, int], seed: int, most: int) -> None:
    n, t, i, o = shape
    a, b = pair(shape, seed)
    x = pair((n, t + 1, i, o), seed + 1)[0]
    ids = torch.randint(5, (n, t), generator=torch.Generator().manual_seed(seed))
    largest = 0

    def watched(left: Tensor, right: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, left.shape[0] * left.shape[1] * right.shape[-1])
        return torch.bmm(left, right)

    whole = Factored(a, b), LookupGradient(ids, b)
    expected = whole[0].norm_sq(), whole[0].apply(x), whole[1].norm_sq()
    with mock.patch.object(ghost, "MOST_AT_ONCE", most), mock.patch.object(Tensor, "__matmul__", watched):
        close(whole[0].norm_sq(), expected[0])
        assert largest <= max(most, n * t)  # one token of each sample is the least
        close(whole[0].apply(x), expected[1])
        close(whole[1].norm_sq(), expected[2])


@given(SHAPES, SEEDS, st.sampled_from([(True, True), (True, False), (False, True)]))
def test_a_layers_gradient_is_that_of_autograd(
    shape: tuple[int, int, int, int], seed: int, parts: tuple[bool, bool]
) -> None:
    a, b = pair(shape, seed)
    weight, bias = parts
    n, _, i, o = shape
    grads = [by_autograd(a[j], b[j], weight, bias) for j in range(n)]
    mean = MeanGradient(
        torch.randn(o, i, dtype=torch.float64) if weight else None,
        torch.randn(o, dtype=torch.float64) if bias else None,
    )
    wanted_norm = [sum(g.square().sum() for g in gs if g is not None) for gs in grads]
    pairs = [[(g, m) for g, m in zip(gs, (mean.weight, mean.bias), strict=True) if g is not None] for gs in grads]
    wanted_dot = [sum((g * m).sum() for g, m in ps) for ps in pairs]

    gradient = layer_gradient(a, b, weight=weight, bias=bias)

    close(gradient.norm_sq(), torch.tensor(wanted_norm, dtype=torch.float64))
    close(gradient.dot(mean), torch.tensor(wanted_dot, dtype=torch.float64))
    for j in range(n):
        change = torch.zeros(a.shape[1], o, dtype=torch.float64)
        change = change + (a[j] @ grads[j][0].T if grads[j][0] is not None else 0)
        change = change + (grads[j][1] if grads[j][1] is not None else 0)
        close(gradient.apply(a)[j], change)
    summed = summed_gradient(a, b, weight=weight, bias=bias)
    assert (summed.weight is not None, summed.bias is not None) == parts
    if n:
        close(summed.norm_sq(), sum(g.square().sum() for g in total(grads)))


def by_autograd(a: Tensor, b: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    w = torch.zeros(b.shape[1], a.shape[1], dtype=a.dtype, requires_grad=True)
    c = torch.zeros(b.shape[1], dtype=a.dtype, requires_grad=True)
    dw, dc = torch.autograd.grad(((a @ w.T + c) * b).sum(), (w, c))
    return dw if weight else None, dc if bias else None


def total(grads: list[tuple[Tensor | None, Tensor | None]]) -> list[Tensor]:
    return [
        torch.stack([g for g in column if g is not None]).sum(0)
        for column in zip(*grads, strict=True)
        if column[0] is not None
    ]


@given(SHAPES, SEEDS)
def test_means_add_up_over_batches(shape: tuple[int, int, int, int], seed: int) -> None:
    a, b = pair(shape, seed)
    whole = summed_gradient(a, b, weight=True, bias=True).scaled(0.5)
    halves = [summed_gradient(a[part], b[part], weight=True, bias=True) for part in (slice(0, 2), slice(2, None))]
    both = halves[0].plus(halves[1]).scaled(0.5)
    assert whole.weight is not None
    assert whole.bias is not None
    close(both.weight, whole.weight)
    close(both.bias, whole.bias)


@pytest.mark.parametrize(
    ("tokens", "form"), [(1, Factored), (3, Factored), (4, Explicit), (50, Explicit)], ids=["1", "3", "4", "50"]
)
def test_the_cheaper_form_is_taken(tokens: int, form: type) -> None:
    # 8 × 8: t·16 < 64 up to t = 3.
    assert isinstance(weight_gradient(*pair((2, tokens, 8, 8), 0)), form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 40])
def test_sums_of_half_precision_are_in_float32(dtype: torch.dtype, tokens: int) -> None:
    a, b = pair((3, tokens, 8, 8), 0, dtype)
    gradient = layer_gradient(a, b, weight=True, bias=True)
    exact = layer_gradient(a.double(), b.double(), weight=True, bias=True)
    assert gradient.norm_sq().dtype == torch.float32
    torch.testing.assert_close(gradient.norm_sq().double(), exact.norm_sq(), rtol=0.02, atol=0)
    summed = summed_gradient(a, b, weight=True, bias=True)
    assert summed.weight is not None
    assert summed.weight.dtype == torch.float32
    assert gradient.dot(summed).dtype == torch.float32
    assert gradient.apply(a).dtype == dtype


def test_inputs_take_the_precision_that_the_layer_computed_in() -> None:
    # Under autocast a layer's input may be float32 and its output bfloat16.
    a, b = pair((2, 3, 4, 5), 0, torch.float32)
    assert layer_gradient(a, b.bfloat16(), weight=True, bias=True).norm_sq().shape == (2,)


def test_while_tests_run_shapes_that_disagree_and_wrong_types_are_refused() -> None:
    """What conftest.py promises: else a wrong annotation, and a call that contradicts it, would stay unseen."""
    a, b = pair((2, 3, 4, 5), 0)
    with pytest.raises(TypeCheckError):
        weight_gradient(a, b[:, :2])  # t is 3 in a, and 2 here
    with pytest.raises(TypeCheckError):
        weight_gradient(a.long(), b)
    with pytest.raises(BeartypeException):
        is_embedding("a name")  # no shape, so beartype's own error
