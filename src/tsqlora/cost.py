"""Cost of training: passes of rows forward and backward, tokens and seconds, by phase."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `tsqlora doctor` reads a run's directory without torch
    from tsqlora.model.terms import Term


@dataclass(slots=True)
class PhaseCost:
    """The cost of one phase of a run. Passes count samples: a row forward, a row backward."""

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    tokens: int = 0

    def add(self, *, seconds: float = 0.0, forward: int = 0, backward: int = 0, tokens: int = 0) -> None:
        self.seconds += seconds
        self.forward += forward
        self.backward += backward
        self.tokens += tokens


def look_cost(terms: "Collection[Term]", *, rows: int, reference: int, trusted: int = 0) -> PhaseCost:
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
