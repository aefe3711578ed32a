"""What training costs: passes of rows forward and backward, tokens and seconds, by phase."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `tsqlora doctor` reads a run's directory without torch
    from tsqlora.quality.terms import Term


@dataclass(slots=True)
class PhaseCost:
    """What one phase of a run took. Passes count samples: a row forward, a row backward."""

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    tokens: int = 0

    def add(self, *, seconds: float = 0.0, forward: int = 0, backward: int = 0, tokens: int = 0) -> None:
        self.seconds += seconds
        self.forward += forward
        self.backward += backward
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class ScoringPasses:
    """How often one scoring passes over all rows and over the reference; with gradients both go backward once."""

    rows: int
    reference: int
    test: int
    """Over the reference, each time that the model is tested against chance."""
    gradients: bool

    def cost(self, rows: int, reference: int) -> PhaseCost:
        """Of one scoring of so many rows."""
        backward = rows + reference if self.gradients else 0
        return PhaseCost(forward=self.rows * rows + self.reference * reference, backward=backward)


def scoring_passes(terms: "Collection[Term]", *, text: bool) -> ScoringPasses:
    """Of a scoring with these terms; `text` for a model that generates text.

    The reference is passed forward for calibration, and every row forward. Where a term needs gradients both go
    backward too, the reference in a pass of its own; where terms look ahead, rows go forward again. A model of text
    is tested against itself as it was before its adapter learned.
    """
    gradients = any(term.gradient for term in terms)
    test = 1 + text
    return ScoringPasses(
        rows=1 + any(term.lookahead for term in terms) + any(term.alone for term in terms),
        reference=test + gradients,
        test=test,
        gradients=gradients,
    )
