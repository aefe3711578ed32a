"""Has the model learned something?  Scores of a model at chance rank nothing.  METHOD 1."""

import math
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor

from tsqlora.errors import NotLearnedError, TsqLoraError

MARGIN = 2.0
"""Standard errors by which the mean loss must lie below the constant predictor's, or of text the unadapted model's."""
SAME = 1e-9
"""A constant guess's loss is below this where labels are all the same."""


@dataclass(frozen=True, slots=True)
class LearnedTest:
    """A one-sided paired test of the model's losses against those of who knows nothing."""

    rows: int
    loss: float
    chance: float
    standard_errors: float
    guess: str = "a constant guess's"
    """Whose loss `chance` is."""

    @property
    def passed(self) -> bool:
        return self.standard_errors > MARGIN

    def require(self) -> None:
        """Raises NotLearnedError with the numbers, if the test did not pass."""
        if self.passed:
            return
        if self.chance < SAME:
            raise NotLearnedError(
                f"all {self.rows} reference rows have the same label, which a constant guess knows as well as any "
                "model; give rows of different labels"
            )
        raise NotLearnedError(
            f"the model's loss on {self.rows} reference rows is {self.loss:.4f}, {self.guess} is "
            f"{self.chance:.4f}: {self.standard_errors:.1f} standard errors below, and scoring needs more than "
            f"{MARGIN:g}; train it longer first"
        )

    def to_dict(self) -> dict[str, float | int | bool | str]:
        return asdict(self) | {"passed": self.passed}


def learned(losses: Float[Tensor, " n"], chance: Float[Tensor, " n"], guess: str = "a constant guess's") -> LearnedTest:
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
    return LearnedTest(
        len(difference), float(losses.mean()), float(chance.mean()), mean / error if error else 0.0, guess
    )
