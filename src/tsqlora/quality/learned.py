"""Has the model learned something?  Scores of a model at chance rank nothing.  METHOD 1."""

import math
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor

from tsqlora.errors import TsqLoraError

MARGIN = 2.0
"""Standard errors by which the mean loss must lie below the constant predictor's."""
SAME = 1e-9
"""A constant guess's loss is below this where labels are all the same."""


@dataclass(frozen=True, slots=True)
class LearnedTest:
    """A one-sided paired test of the model's losses against those of who knows nothing."""

    rows: int
    loss: float
    chance: float
    standard_errors: float

    @property
    def passed(self) -> bool:
        return self.standard_errors > MARGIN

    @property
    def told(self) -> str:
        """Why it did not pass, with the numbers."""
        if self.chance < SAME:
            return f"all {self.rows} rows have the same label, which a constant guess knows as well as any model"
        return (
            f"the model's loss on {self.rows} rows is {self.loss:.4f}, a constant guess's is {self.chance:.4f}: "
            f"{self.standard_errors:.1f} standard errors below, and more than {MARGIN:g} are needed"
        )

    def to_dict(self) -> dict[str, float | int | bool | str]:
        return asdict(self) | {"passed": self.passed}


def learned(losses: Float[Tensor, " n"], chance: Float[Tensor, " n"]) -> LearnedTest:
    """How many standard errors the mean of the paired differences chance − loss lies above 0.

    n is at least 2.  Raises TsqLoraError for losses that are not finite.
    """
    difference = (chance - losses).double()
    if not difference.isfinite().all():
        bad = int((~difference.isfinite()).sum())
        raise TsqLoraError(
            f"{bad} of {len(difference)} reference losses are not finite; "
            "lower training.learning_rate or use another dtype"
        )
    mean = float(difference.mean())
    # Not below rounding: rows that are all alike would be infinitely many errors away.
    error = max(float(difference.std()) / math.sqrt(len(difference)), 1e-9 * abs(mean))
    return LearnedTest(len(difference), float(losses.mean()), float(chance.mean()), mean / error if error else 0.0)
