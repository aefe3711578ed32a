"""The factor between training's loss and the samples' own, at the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tsqlora.errors import UnsupportedError
from tsqlora.quality.own_loss import by_logits, scale_of, source_of
from tsqlora.tasks.classification import Classification

TASK = Classification()
LABELS = torch.tensor([0, 2, 1, 1, 0])


def logits(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@given(st.floats(1e-6, 1e6))
def test_any_factor_is_found(c: float) -> None:
    z = logits().requires_grad_()
    (grad,) = torch.autograd.grad(c * F.cross_entropy(z, LABELS), z)
    assert scale_of(grad, by_logits(TASK, z.detach(), LABELS), TASK.name) == pytest.approx(c / 5, rel=1e-9)


def test_half_precision_has_its_rounding_and_no_more() -> None:
    own = by_logits(TASK, logits(), LABELS)
    assert scale_of((3 * own).bfloat16(), own, TASK.name) == pytest.approx(3, rel=1e-2)
    with pytest.raises(UnsupportedError, match="off any multiple"):
        scale_of((3 * own).bfloat16().double(), own, TASK.name)


def test_gradients_that_vanish_have_a_factor_only_together() -> None:
    own = by_logits(TASK, logits(), LABELS)
    zeros = torch.zeros_like(own)
    assert scale_of(zeros, zeros, TASK.name) == 1
    assert scale_of(zeros, own, TASK.name) == 0
    with pytest.raises(UnsupportedError, match=r"100.0% off any multiple of the samples' own sequence-classification"):
        scale_of(own, zeros, TASK.name)


def test_rows_weighted_unlike_have_no_factor() -> None:
    own = by_logits(TASK, logits(), LABELS)
    own[0] *= 1.01
    with pytest.raises(UnsupportedError, match="pass `task` with the loss that training uses"):
        scale_of(own, by_logits(TASK, logits(), LABELS), TASK.name)


def test_a_cast_behind_the_logits_is_looked_through() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    made = (logits(torch.float32) @ weight).bfloat16() * 2
    seen: list[Tensor] = []
    node, place = source_of(made.float())
    node.register_prehook(lambda grads: seen.append(grads[place]))
    F.cross_entropy(made.float(), LABELS).backward()
    assert [(grad.dtype, grad.shape) for grad in seen] == [(torch.bfloat16, (5, 3))]


def test_logits_that_nothing_trains_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="do not depend on anything that trains"):
        source_of(logits())
