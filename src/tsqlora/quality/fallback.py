"""Would rows drawn by Q teach less than random ones?  Then they are drawn at random.  Ours.

Of each row a number is known already that says what it is worth, and nothing more is measured. Where wrong labels are
evident (`quality/label_noise.py`), it is the chance that its label is wrong. Elsewhere it is the convergence C, the
fall of loss per unit step on the row, whose mean over rows is that of a step on all of them; reference rows are taken
out of their own mean gradient. Where the model is too sure, wrong labels make the mean gradient, and C is backwards: so
it decides only where there are none.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from tsqlora.quality.label_noise import reject
from tsqlora.quality.learned import MARGIN
from tsqlora.quality.sampling import expected_inclusion
from tsqlora.quality.scores import Scores

By = Literal["doubt", "convergence"]


@dataclass(frozen=True, slots=True)
class GuardTest:
    """A one-sided test of what rows drawn by Q are expected to be worth, against a random draw's."""

    by: By
    """What a row's worth is known by: less doubt is better, more convergence."""
    rows: int
    drawn: float
    """Its expected mean over the rows drawn by Q."""
    random: float
    """Its mean over all kept rows."""
    standard_errors: float
    """By which the first is better than the second."""

    @property
    def passed(self) -> bool:
        return self.standard_errors >= -MARGIN

    @property
    def told(self) -> str:
        what, form = {
            "doubt": ("labels would be wrong", "{:.1%}"),
            "convergence": ("the mean convergence would be", "{:.3g}"),
        }[self.by]
        drawn, random = form.format(self.drawn), form.format(self.random)
        return (
            f"{what} {drawn} of rows drawn by Q, {random} of random ones: {-self.standard_errors:.1f} standard errors "
            f"apart, and the guard allows {MARGIN:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        told = {"checked": True, **asdict(self), "passed": self.passed}
        return told if self.passed else {**told, "why": self.told}


def guarded(scores: Scores, fraction: float) -> tuple[Scores, GuardTest | None]:
    """The scores, drawn evenly where the test fails; the record says what came of it. The test, if there was one.

    There is none where rows are drawn evenly anyway; nor where neither wrong labels are evident nor a
    gradient was measured.
    """
    if scores.even:
        return _noted(scores, {"checked": False, "why": "rows are drawn evenly: no Q decides"}), None
    known = _worth(scores)
    if known is None:
        why = "no gradient was measured, and wrong labels are not evident: nothing says what a row is worth"
        return _noted(scores, {"checked": False, "why": why}), None
    chance = expected_inclusion(
        scores.quality, fraction=fraction, temperature=scores.temperature, strata=scores.strata, kept=scores.kept
    )
    test = guard_test(*known, chance=chance, kept=scores.kept)
    noted = _noted(scores, test.to_dict())
    return noted if test.passed else noted.drawn_evenly(), test


def _worth(scores: Scores) -> tuple[By, np.ndarray] | None:
    if scores.stratified and "logits" in scores.predictions:
        logits = scores.predictions["logits"]
        _, noise = reject(logits, scores.labels, frozen=scores.record.frozen)
        if noise.evident:
            return "doubt", noise.doubt(logits, scores.labels)
    if "convergence" in scores.terms:
        return "convergence", scores.terms["convergence"].astype(np.float64)
    return None


def guard_test(
    by: By, values: Float[np.ndarray, " n"], *, chance: Float[np.ndarray, " n"], kept: Bool[np.ndarray, " n"]
) -> GuardTest:
    """Compares Σ q x / Σ q, q the chance that a row is drawn, with the mean of x over kept rows.

    Standard errors are those over rows; noise of the mean gradient, which all rows share, is not in them.
    """
    x, q = values[kept], chance[kept]
    lean = len(x) * q / q.sum() - 1
    parts = lean * (x - x.mean())
    difference = float(parts.mean())
    error = float(parts.std()) / math.sqrt(len(x))
    # Not below rounding: rows drawn alike would be infinitely many errors away.
    tiny = 1e-9 * float(np.abs(x).max(initial=0.0))
    better = difference if by == "convergence" else -difference
    return GuardTest(by, len(x), float(x.mean()) + difference, float(x.mean()), better / error if error > tiny else 0.0)


def _noted(scores: Scores, told: dict[str, Any]) -> Scores:
    return replace(scores, record=replace(scores.record, guard=told))
