from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.ranks.schedule import RankSchedule, moves_allowed

percents = st.integers(0, 49).map(lambda k: k / 100)


def steps_of(total: int, interval: int, warmup: float, freeze: float) -> range:
    return RankSchedule(warmup=warmup, freeze=freeze).steps(total, interval)


@given(st.integers(0, 500), st.integers(1, 60), percents, percents)
def test_adjustments_lie_between_warmup_and_freeze(total: int, interval: int, warmup: float, freeze: float) -> None:
    steps = list(steps_of(total, interval, warmup, freeze))
    percent_of_run = [100 * step for step in steps]
    assert all(round(100 * warmup) * total <= at < round(100 * (1 - freeze)) * total for at in percent_of_run)
    assert all(step >= interval for step in steps)
    assert all(later - step == interval for step, later in pairwise(steps))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        # The first waits for warm-up and for one interval.
        ((100, 20, 0.25, 0.3), [25, 45, 65]),
        ((100, 20, 0.0, 0.3), [20, 40, 60]),
        # The last is strictly before the freeze.
        ((10, 1, 0.7, 0.1), [7, 8]),
        ((80, 20, 0.1, 0.0), [20, 40, 60]),
        # A short run has none.
        ((10, 20, 0.1, 0.1), []),
        ((0, 20, 0.1, 0.1), []),
    ],
)
def test_steps_by_hand(run: tuple[int, int, float, float], expected: list[int]) -> None:
    assert list(steps_of(*run)) == expected


def test_float_error_shifts_no_step() -> None:
    assert 0.07 * 100 > 7, "the trap"
    assert steps_of(100, 1, 0.07, 0.1).start == 7
    assert (1 - 0.42) * 50 > 29, "the trap"
    assert steps_of(50, 1, 0.1, 0.42).stop == 29
    assert steps_of(300, 1, 1 / 3, 1 / 3) == range(100, 200)


@pytest.mark.parametrize(
    ("interval", "warmup", "freeze", "words"),
    [
        (1, -0.1, 0.1, r"ranks\.warmup is -0.1"),
        (1, 0.1, 1.0, r"ranks\.freeze is 1.0"),
        (1, float("nan"), 0.1, r"ranks\.warmup is nan"),
        (1, 0.9, 0.1, r"ranks\.warmup 0.9 and ranks\.freeze 0.1"),
        (0, 0.1, 0.1, r"ranks\.interval is 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(interval: int, warmup: float, freeze: float, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        steps_of(9, interval, warmup, freeze)


@given(st.integers(1, 100), st.integers(1, 200), st.integers(0, 50))
def test_moves_fall_from_first_towards_zero(start: int, length: int, first: int) -> None:
    steps = range(start, start + length, 1)
    allowed = [moves_allowed(step, steps, first=first) for step in steps]
    assert allowed[0] == first
    assert allowed == sorted(allowed, reverse=True)
    assert min(allowed) >= 0


def test_moves_fall_as_a_cubic() -> None:
    steps = range(100, 200, 10)
    assert [moves_allowed(step, steps, first=1000) for step in steps] == [
        1000, 999, 992, 973, 936, 875, 784, 657, 488, 271,
    ]  # fmt: skip


def test_nothing_moves_outside_the_adjustment_phase() -> None:
    steps = range(20, 80, 20)
    assert [moves_allowed(step, steps, first=8) for step in (0, 19, 80, 100)] == [0, 0, 0, 0]
    assert moves_allowed(20, range(20, 20, 5), first=8) == 0
    assert moves_allowed(20, range(20, 10, 5), first=8) == 0
