from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from tsqlora.quality.fallback import guard_test, guarded
from tsqlora.quality.sampling import expected_inclusion
from tsqlora.quality.scores import Scores, from_terms

ALL = np.ones(400, dtype=bool)


def scored(weights: dict[str, float], *, n: int = 400, noise: float = 0.0, even: bool = False, seed: int = 0) -> Scores:
    """Rows of two classes of which the model is right, a share with a wrong label; C knows nothing of it."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 2, size=n)
    margin = 2 * rng.exponential(size=n) * (2 * true - 1)
    logits = np.stack([-margin, margin], axis=1)
    drawn = (rng.random(n) > softmax(logits, axis=1)[:, 0]).astype(int)
    labels = np.where(rng.random(n) < noise, 1 - drawn, drawn)
    loss = -np.log(softmax(logits, axis=1)[np.arange(n), labels])
    return from_terms(
        {"loss": loss, "convergence": rng.normal(size=n)},
        labels=labels,
        stratified=True,
        weights=weights,
        temperature=1.0,
        even=even,
        record={},
        predictions={"logits": logits},
    )


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_only_the_order_of_magnitude_of_a_difference_against_its_noise_counts(
    s: int, scale: float, shift: float
) -> None:
    rng = np.random.default_rng(s)
    x, q = rng.normal(size=400), rng.uniform(0.1, 1, size=400)
    one = guard_test("convergence", x, chance=q, kept=ALL)
    order = rng.permutation(400)
    for other in (
        guard_test("convergence", scale * x + shift, chance=q, kept=ALL),
        guard_test("convergence", x[order], chance=q[order], kept=ALL),
        guard_test("convergence", x, chance=q / 3, kept=ALL),
    ):
        assert other.standard_errors == pytest.approx(one.standard_errors, rel=1e-6, abs=1e-6)
    assert guard_test("doubt", x, chance=q, kept=ALL).standard_errors == pytest.approx(-one.standard_errors)


def test_means_are_those_of_the_rows_drawn_and_of_the_kept_ones() -> None:
    x, q = np.array([1.0, 2.0, 6.0, 100.0]), np.array([0.5, 1.0, 0.5, 0.0])
    test = guard_test("convergence", x, chance=q, kept=np.array([True, True, True, False]))
    assert (test.rows, test.random) == (3, pytest.approx(3.0))
    assert test.drawn == pytest.approx((0.5 * 1 + 2 + 0.5 * 6) / 2)
    parts = np.array([-0.25, 0.5, -0.25]) * (x[:3] - 3)
    assert test.standard_errors == pytest.approx(parts.mean() / (parts.std() / np.sqrt(3)))


def test_rows_drawn_alike_are_no_error_away() -> None:
    test = guard_test("convergence", np.random.default_rng(0).normal(size=400), chance=np.full(400, 0.3), kept=ALL)
    assert test.standard_errors == 0
    assert test.passed


def test_a_draw_that_has_nothing_to_do_with_worth_seldom_fails() -> None:
    failed = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        chance = expected_inclusion(rng.normal(size=400), fraction=0.5, temperature=1.0)
        failed += not guard_test("convergence", rng.exponential(size=400), chance=chance, kept=ALL).passed
    assert failed < 0.06 * 400


@pytest.mark.parametrize(("weight", "passes"), [(1.0, True), (-1.0, False)])
def test_without_evident_wrong_labels_convergence_decides(weight: float, passes: bool) -> None:
    scores, test = guarded(scored({"convergence": weight}), 0.5)
    assert test is not None
    assert (test.by, test.passed) == ("convergence", passes)
    told = {"checked": True, **{n: getattr(test, n) for n in GUARD}, "passed": passes}
    assert scores.record.guard == (told if passes else {**told, "why": test.told})
    assert (test.drawn > test.random) == passes
    assert scores.even == (not passes)


GUARD = ("by", "rows", "drawn", "random", "standard_errors")


def test_what_fails_is_drawn_as_random_rows_are() -> None:
    before = scored({"convergence": -1.0}).drop(np.arange(400) < 40, "duplicate")
    scores, test = guarded(before, 0.5)
    assert test is not None
    assert not test.passed
    assert test.rows == 360
    assert np.ptp(scores.probability[40:]) == 0
    assert (scores.probability[:40] == 0).all()
    assert scores.record.effective_sample_size == pytest.approx(360)
    assert (scores.quality == before.quality).all()
    text = f"the mean convergence would be {test.drawn:.3g} of rows drawn by Q, {test.random:.3g} of random ones: "
    assert test.told.startswith(text)


@pytest.mark.parametrize(("weight", "passes"), [(1.0, False), (-1.0, True)])
def test_where_wrong_labels_are_evident_their_share_decides(weight: float, passes: bool) -> None:
    """Also against a convergence that is backwards."""
    scores, test = guarded(scored({"loss": weight, "convergence": -weight}, noise=0.2), 0.5)
    assert test is not None
    assert (test.by, test.passed) == ("doubt", passes)
    assert (test.drawn < test.random) == passes
    assert 0.05 < test.random < 0.3
    assert scores.even == (not passes)
    assert test.told.startswith("labels would be wrong ")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"weights": {"loss": -1.0}, "even": True}, "rows are drawn evenly: no Q decides"),
        ({"weights": {"loss": -1.0}}, "no gradient was measured, and wrong labels are not evident: nothing says what"),
    ],
)
def test_where_there_is_nothing_to_go_on_the_record_says_so(given: dict[str, Any], why: str) -> None:
    before = scored(**given)
    before = Scores(**{n: getattr(before, n) for n in before.__slots__} | {"terms": {"loss": before.terms["loss"]}})
    scores, test = guarded(before, 0.5)
    assert test is None
    assert scores.record.guard["checked"] is False
    assert scores.record.guard["why"].startswith(why)
    assert (scores.probability == before.probability).all()
