"""Terms of a row's quality as a table, and their sum Q.  docs/method.md eq. 1 to 4.

A term is a function of what one pass measured. To add one, add an entry to TERMS, or pass the function itself.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsqlora.errors import SettingsError, nearest
from tsqlora.libs.shapes import Float, Int, Shaped
from tsqlora.record import PhaseCost

CLIP = 3.0
"""Standardised terms are clipped to this many deviations."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of the n samples of one batch; None where no term needs them."""

    logits: Float[Tensor, "n k"] | None
    """Calibrated, as is `loss`; None for generation."""
    labels: Shaped[Tensor, "n *t"]
    loss: Float[Tensor, " n"]
    norm_sq: Float[Tensor, " n"] | None = None
    """‖∇ℓ‖²."""
    dot: Float[Tensor, " n"] | None = None
    """⟨∇ℓ, ḡ⟩; ḡ excludes the sample itself if it is in the reference."""
    reference_norm: float | None = None
    stepped_loss: Float[Tensor, " n"] | None = None
    """Loss after a step on the sample alone."""


@dataclass(frozen=True, slots=True)
class Term:
    """One measure of a sample's worth: larger means worth more."""

    of: Callable[[Measured], Float[Tensor, " n"]]
    gradient: bool = False
    """Needs gradients: a backward pass, and one of the reference."""
    lookahead: bool = False
    """Needs the stepped loss: one more forward pass."""
    answers: bool = False
    """Exists only where a sample has one answer, a class or a number."""
    probe: bool = False
    """Needs hidden states of text and of trusted rows: the look's forward pass gives them, a pass over batches not."""


def look_cost(terms: Collection[Term], *, rows: int, reference: int, trusted: int = 0) -> PhaseCost:
    """Return the cost of a look that measures these terms.

    Every row and every trusted row goes forward once. If a term needs gradients, all rows go forward and backward, and
    the reference goes forward for calibration, and forward and backward for its mean gradient. Look-ahead terms take
    one more forward pass.
    """
    cost = PhaseCost(forward=rows + trusted)
    if any(term.gradient for term in terms):
        cost.add(forward=rows + 2 * reference, backward=rows + reference)
    cost.add(forward=rows * any(term.lookahead for term in terms))
    return cost


def required(value: Float[Tensor, "*n"] | None) -> Float[Tensor, "*n"]:
    """A measurement that the term's flags asked for."""
    assert value is not None
    return value


def _el2n(m: Measured) -> Float[Tensor, " n"]:
    """‖p − y‖ (Paul et al., 2021), for several labels of their sigmoids; for regression |prediction − label|."""
    logits = required(m.logits)
    width = logits.shape[1]
    if m.labels.dim() == 2:
        return (logits.sigmoid() - m.labels).norm(dim=1)
    if width == 1:
        return (logits.squeeze(1) - m.labels).abs()
    return (logits.softmax(1) - torch.nn.functional.one_hot(m.labels, width)).norm(dim=1)


def _density_ratio(m: Measured) -> Float[Tensor, " n"]:
    """log p(row | trusted) − log p(row | pool), which the look fits (`auditing/labels/density_ratio.py`)."""
    raise AssertionError("no batch has it")


TERMS: dict[str, Term] = {
    "loss": Term(lambda m: m.loss),
    "el2n": Term(_el2n, answers=True),
    "density_ratio": Term(_density_ratio, probe=True),
}

TermSpec = str | Term | Callable[[Measured], Any]
"""A name in TERMS, or a custom term: a function of Measured, or a Term if it needs gradients."""


def published() -> ModuleType:
    """The wing of the published method, imported only where a setting or a term asks for it."""
    from tsqlora import paper

    return paper


def get_terms(specs: Iterable[TermSpec]) -> dict[str, Term]:
    """Return the entries of TERMS, here and of the paper's wing, for names; custom terms have their functions' names.

    Raises SettingsError for an unknown name, and for a function whose name cannot be a column.
    """
    terms: dict[str, Term] = {}
    for spec in specs:
        if isinstance(spec, str):
            every = TERMS if spec in TERMS else TERMS | published().TERMS | terms
            if spec not in every:
                raise SettingsError(f"unknown quality term '{spec}'; {nearest(spec, every)}")
            terms.setdefault(spec, every[spec])
            continue
        name = str(getattr(spec.of if isinstance(spec, Term) else spec, "__name__", type(spec).__name__))
        if not name.isidentifier() or name in TERMS | published().TERMS:
            raise SettingsError(f"a custom term is named after its function, and '{name}' is not usable; rename it")
        terms[name] = spec if isinstance(spec, Term) else Term(spec)
    return terms


def standardise(values: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return (x − median) / (1.4826 MAD) within each group, clipped to ±CLIP.

    Where more than half of a group is one value, up to rounding, the MAD is 0 and IQR / 1.349 replaces it; where that
    is 0 too, values are 0.  Both factors make the deviation of a normal sample 1.
    """
    out = np.zeros(len(values), dtype=np.float64)
    for group in np.unique(groups):
        rows = groups == group
        x = values[rows].astype(np.float64)
        centred = x - np.median(x)
        # Equal rows differ by the rounding of their batches, which must not be scaled up.
        rounding = 1e-5 * np.median(np.abs(x))
        scale = 1.4826 * np.median(np.abs(centred))
        if scale <= rounding:
            low, high = np.quantile(centred, [0.25, 0.75])
            scale = (high - low) / 1.349
        if scale > rounding:
            out[rows] = np.clip(centred / scale, -CLIP, CLIP)
    return out


def quality(
    standardised: Mapping[str, Float[np.ndarray, " n"]], weights: Mapping[str, float]
) -> Float[np.ndarray, " n"]:
    """Return Q = Σ α z(term), docs/method.md eq. 4.  `standardised` needs every term with a weight."""
    return np.sum([weight * standardised[name] for name, weight in weights.items() if weight], axis=0)


def columns_of(terms: Mapping[str, Term], measured: Measured) -> dict[str, np.ndarray]:
    """Return the terms of measured rows.  Raises SettingsError for a term with another number of values than rows."""
    values, rows = {name: term.of(measured) for name, term in terms.items()}, len(measured.labels)
    for name, value in values.items():
        if value.shape != (rows,):
            raise SettingsError(f"quality term '{name}' gives {tuple(value.shape)} for {rows} samples")
    return {name: value.cpu().numpy() for name, value in values.items()}
