"""Would rows drawn by Q teach less than random ones?  Then they are drawn at random.  Ours.

A row's convergence C is the fall of everybody's loss per unit step on it, and a mean of C over rows is that of a
step on all of them. So the mean that the draw is expected to have is compared with that of a random draw.
Nothing is measured for it: reference rows are taken out of their own mean gradient already.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tsqlora.quality.learned import MARGIN
from tsqlora.quality.sampling import expected_inclusion
from tsqlora.quality.scores import Scores


@dataclass(frozen=True, slots=True)
class GuardTest:
    """A one-sided test of the drawn rows' expected convergence against a random draw's."""

    rows: int
    drawn: float
    """Expected mean convergence of the rows drawn by Q."""
    random: float
    """The mean over all kept rows."""
    standard_errors: float
    """By which the first lies above the second."""

    @property
    def passed(self) -> bool:
        return self.standard_errors >= -MARGIN

    @property
    def told(self) -> str:
        return (
            f"rows drawn by Q would have a mean convergence of {self.drawn:.3g}, random ones have {self.random:.3g}: "
            f"{-self.standard_errors:.1f} standard errors more, and the guard allows {MARGIN:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"checked": True, **asdict(self), "passed": self.passed}


def guarded(scores: Scores, fraction: float) -> tuple[Scores, GuardTest | None]:
    """The scores, drawn evenly where the test fails; the record says what came of it. The test, if there was one.

    There is none where rows are drawn evenly anyway, and where no gradient decides, since then no
    convergence was measured.
    """
    if scores.even:
        return _noted(scores, {"checked": False, "why": "rows are drawn evenly: no Q decides"}), None
    if "convergence" not in scores.terms:
        return _noted(scores, {"checked": False, "why": "no gradient was measured, so no convergence is known"}), None
    chance = expected_inclusion(
        scores.quality, fraction=fraction, temperature=scores.temperature, strata=scores.strata, kept=scores.kept
    )
    test = guard_test(scores.terms["convergence"].astype(np.float64), chance, scores.kept)
    noted = _noted(scores, test.to_dict())
    return noted if test.passed else noted.drawn_evenly(), test


def guard_test(
    convergence: Float[np.ndarray, " n"], chance: Float[np.ndarray, " n"], kept: Bool[np.ndarray, " n"]
) -> GuardTest:
    """Compares Σ q C / Σ q with the mean of C over kept rows, in standard errors over rows.

    The noise of the mean gradient itself, which all rows share, is not in them.
    """
    c, q = convergence[kept], chance[kept]
    lean = len(c) * q / q.sum() - 1
    parts = lean * (c - c.mean())
    error = float(parts.std(ddof=1)) / math.sqrt(len(c)) if len(c) > 1 else 0.0
    difference = float(parts.mean())
    # Not below rounding: rows drawn alike would be infinitely many errors away.
    floor = 1e-9 * float(np.abs(c).max(initial=0.0))
    standard = difference / error if error > floor else 0.0
    return GuardTest(len(c), float(c.mean()) + difference, float(c.mean()), standard)


def _noted(scores: Scores, told: dict[str, Any]) -> Scores:
    return replace(scores, record={**scores.record, "guard": told})
