"""The published terms of a row's quality, which need its gradient.  docs/method.md eq. 1 to 3."""

import torch
from torch import Tensor

from tsqlora.libs.shapes import Float
from tsqlora.model.terms import Measured, Term, required


def _gradient_norm(m: Measured) -> Float[Tensor, " n"]:
    return required(m.norm_sq).sqrt()


def _convergence(m: Measured) -> Float[Tensor, " n"]:
    assert m.reference_norm is not None
    return required(m.dot) / m.reference_norm


def _cosine(m: Measured) -> Float[Tensor, " n"]:
    norm = _gradient_norm(m)
    return torch.where(norm > 0, _convergence(m) / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0)


PAPER_TERMS = ("gradient_norm", "loss_reduction", "convergence")
TERMS: dict[str, Term] = {
    "gradient_norm": Term(_gradient_norm, gradient=True),
    "loss_reduction": Term(lambda m: m.loss - required(m.stepped_loss), gradient=True, lookahead=True),
    "convergence": Term(_convergence, gradient=True),
    "cosine": Term(_cosine, gradient=True),
}
