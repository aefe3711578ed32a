"""What can be known of a sample's worth, as a table, and how terms add up to Q.

METHOD eq. 1 to 4. A term is a function of what one pass measured; to have another, add an
entry to TERMS, or give the function itself where a name is asked for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tsqlora.errors import SettingsError, nearest

CLIP = 3.0
"""Standardised terms beyond this many deviations count as this many."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the passes over one batch say of its n samples."""

    logits: Float[Tensor, "n k"] | None
    """Calibrated, as is `loss`; None of generated text."""
    labels: Shaped[Tensor, "n *t"]
    loss: Float[Tensor, " n"]
    norm_sq: Float[Tensor, " n"] | None = None
    """‖∇ℓ‖²; this and what follows are None where no term asked for it."""
    dot: Float[Tensor, " n"] | None = None
    """⟨∇ℓ, ḡ⟩; ḡ without the sample itself where the sample is in the reference."""
    reference_norm: float | None = None
    stepped_loss: Float[Tensor, " n"] | None = None
    """After each sample's own step."""
    alone_loss: Float[Tensor, " n"] | None = None
    """Of the target without its prompt."""
    trusted_loss: Float[Tensor, " n"] | None = None
    """Of the trusted model θ_R."""


@dataclass(frozen=True, slots=True)
class Term:
    """One measure of a sample's worth: larger is to be worth more."""

    of: Callable[[Measured], Float[Tensor, " n"]]
    gradient: bool = False
    """Whether it needs gradients, which cost a backward pass, and one of the reference."""
    lookahead: bool = False
    """Whether it needs the stepped loss, which costs one more forward pass."""
    answers: bool = False
    """Whether it is known only where a sample has one answer, a class or a number."""
    alone: bool = False
    """Whether it needs the loss of the target without its prompt, which costs one more forward pass."""
    trusted: bool = False
    """Whether it needs the trusted model's loss, which costs its training and a forward pass."""


def _asked(number: Float[Tensor, "*n"] | None) -> Float[Tensor, "*n"]:
    assert number is not None
    return number


def _gradient_norm(m: Measured) -> Float[Tensor, " n"]:
    return _asked(m.norm_sq).sqrt()


def _convergence(m: Measured) -> Float[Tensor, " n"]:
    assert m.reference_norm is not None
    return _asked(m.dot) / m.reference_norm


def _loss_reduction(m: Measured) -> Float[Tensor, " n"]:
    return m.loss - _asked(m.stepped_loss)


def _cosine(m: Measured) -> Float[Tensor, " n"]:
    norm = _gradient_norm(m)
    return torch.where(norm > 0, _convergence(m) / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0)


def _el2n(m: Measured) -> Float[Tensor, " n"]:
    """‖p − y‖ (Paul et al., 2021); for regression |prediction − label|."""
    logits = _asked(m.logits)
    width = logits.shape[1]
    if width == 1:
        return (logits.squeeze(1) - m.labels).abs()
    return (logits.softmax(1) - torch.nn.functional.one_hot(m.labels, width)).norm(dim=1)


def _ifd(m: Measured) -> Float[Tensor, " n"]:
    """ℓ(target | prompt) / ℓ(target): instruction-following difficulty (Li et al., 2024)."""
    alone = _asked(m.alone_loss)
    return torch.where(alone > 0, m.loss / alone.clamp_min(torch.finfo(m.loss.dtype).tiny), 1)


def _reducible_loss(m: Measured) -> Float[Tensor, " n"]:
    """ℓ(θ) − ℓ(θ_R), eq. 3′ (after RHO-loss and CoLoR-Filter); divided by ℓ(θ) where the answer is text."""
    difference = m.loss - _asked(m.trusted_loss)
    return difference if m.logits is not None else difference / m.loss.clamp_min(torch.finfo(m.loss.dtype).tiny)


TERMS: dict[str, Term] = {
    "gradient_norm": Term(_gradient_norm, gradient=True),
    "loss_reduction": Term(_loss_reduction, gradient=True, lookahead=True),
    "convergence": Term(_convergence, gradient=True),
    "cosine": Term(_cosine, gradient=True),
    "loss": Term(lambda m: m.loss),
    "el2n": Term(_el2n, answers=True),
    "ifd": Term(_ifd, alone=True),
    "reducible_loss": Term(_reducible_loss, trusted=True),
}


Asked = str | Term | Callable[[Measured], Any]
"""A term by its name in TERMS, or one's own: a function of what was measured, as a Term where that takes gradients."""


def get_terms(asked: Iterable[Asked]) -> dict[str, Term]:
    """The entries of TERMS for these names, and those that are given themselves, by their functions' names.

    Raises SettingsError for an unknown name, and for a function whose name cannot be a column's.
    """
    asked = list(asked)
    known = TERMS | dict(_own_term(given) for given in asked if not isinstance(given, str))
    names = [given if isinstance(given, str) else _name_of(given) for given in asked]
    for name in names:
        if name not in known:
            raise SettingsError(f"unknown quality term '{name}'; {nearest(name, known)}")
    return {name: known[name] for name in names}


def _own_term(given: Term | Callable[[Measured], Any]) -> tuple[str, Term]:
    name = _name_of(given)
    if not name.isidentifier() or name in TERMS:
        raise SettingsError(
            f"a term of one's own is named by its function, and not '{name}'; define one by another name"
        )
    return name, given if isinstance(given, Term) else Term(given)


def _name_of(own: Term | Callable[[Measured], Any]) -> str:
    return str(getattr(own.of if isinstance(own, Term) else own, "__name__", type(own).__name__))


@dataclass(frozen=True, slots=True)
class Standardised:
    """A term in robust deviations from its median, and the groups in which it says nothing."""

    values: Float[np.ndarray, " n"]
    by_range: tuple[int, ...]
    """Groups in which the interquartile range had to stand in for a MAD of zero."""
    flat: tuple[int, ...]
    """Groups without spread: every value there is 0."""


def standardise(values: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Standardised:
    """(x − median) / (1.4826 MAD) within each group, clipped to ±CLIP.

    Where more than half of a group is one value, up to rounding, the MAD is 0 and IQR / 1.349
    is used; where that is 0 too, 0.  Both factors make a normal sample's deviation 1.
    """
    out = np.zeros(len(values), dtype=np.float64)
    by_range: list[int] = []
    flat: list[int] = []
    for group in np.unique(groups):
        rows = groups == group
        x = values[rows].astype(np.float64)
        centred = x - np.median(x)
        # Equal rows differ by rounding with the batch they were in; that must not be scaled up.
        rounding = 1e-5 * np.median(np.abs(x))
        scale = 1.4826 * np.median(np.abs(centred))
        if scale <= rounding:
            low, high = np.quantile(centred, [0.25, 0.75])
            scale = (high - low) / 1.349
            (by_range if scale > rounding else flat).append(int(group))
        if scale > rounding:
            out[rows] = np.clip(centred / scale, -CLIP, CLIP)
    return Standardised(out, tuple(by_range), tuple(flat))


def quality(
    standardised: Mapping[str, Float[np.ndarray, " n"]], weights: Mapping[str, float]
) -> Float[np.ndarray, " n"]:
    """Q = Σ α z(term), METHOD eq. 4.  `standardised` must hold every term with a weight."""
    terms = [weight * standardised[name] for name, weight in weights.items() if weight]
    return np.sum(terms, axis=0)
