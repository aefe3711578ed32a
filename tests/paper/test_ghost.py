"""Per-sample gradients, in both forms, against those of autograd."""

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
    layer_gradient,
    norm_sq,
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
    shapes = [shape for shape, trains in (((o, i), weight), ((o,), bias)) if trains]
    mean = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    wanted_norm = [sum(g.square().sum() for g in gs) for gs in grads]
    wanted_dot = [sum((g * m).sum() for g, m in zip(gs, mean, strict=True)) for gs in grads]

    gradient = layer_gradient(a, b, weight=weight, bias=bias)

    close(gradient.norm_sq(), torch.tensor(wanted_norm, dtype=torch.float64))
    close(gradient.dot(mean), torch.tensor(wanted_dot, dtype=torch.float64))
    x = pair((n, 4, i, o), seed + 1)[0]
    for j in range(n):
        close(gradient.apply(x)[j], sum(x[j] @ g.T if g.dim() == 2 else g.expand(4, -1) for g in grads[j]))
    if n:
        summed, total = (
            summed_gradient(a, b, weight=weight, bias=bias),
            [sum(column) for column in zip(*grads, strict=True)],
        )
        for one, whole in zip(summed, total, strict=True):
            close(one, whole)
        close(norm_sq(summed), sum(g.square().sum() for g in total))


def by_autograd(a: Tensor, b: Tensor, weight: bool, bias: bool) -> list[Tensor]:
    w = torch.zeros(b.shape[1], a.shape[1], dtype=a.dtype, requires_grad=True)
    c = torch.zeros(b.shape[1], dtype=a.dtype, requires_grad=True)
    dw, dc = torch.autograd.grad(((a @ w.T + c) * b).sum(), (w, c))
    return [dw] * weight + [dc] * bias


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
    assert {part.dtype for part in summed} == {torch.float32}
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
