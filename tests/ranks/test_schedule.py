from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.ranks.schedule import adjustment_steps, moves_allowed

percents = st.integers(0, 49).map(lambda k: k / 100)


@given(st.integers(0, 500), st.integers(1, 60), percents, percents)
def test_adjustments_lie_between_warmup_and_freeze(total: int, interval: int, warmup: float, freeze: float) -> None:
    steps = list(adjustment_steps(total, interval=interval, warmup=warmup, freeze=freeze))
    percent_of_run = [100 * step for step in steps]
    assert all(round(100 * warmup) * total <= at < round(100 * (1 - freeze)) * total for at in percent_of_run)
    assert all(step >= interval for step in steps)
    assert all(later - step == interval for step, later in pairwise(steps))


def test_the_first_adjustment_waits_for_warmup_and_for_one_interval() -> None:
    assert list(adjustment_steps(100, interval=20, warmup=0.25, freeze=0.3)) == [25, 45, 65]
    assert list(adjustment_steps(100, interval=20, warmup=0.0, freeze=0.3)) == [20, 40, 60]


def test_the_last_adjustment_is_strictly_before_the_freeze() -> None:
    assert list(adjustment_steps(10, interval=1, warmup=0.7, freeze=0.1)) == [7, 8]
    assert list(adjustment_steps(90, interval=20, warmup=0.1, freeze=0.0)) == [20, 40, 60, 80]
    assert list(adjustment_steps(80, interval=20, warmup=0.1, freeze=0.0)) == [20, 40, 60]


def test_float_error_shifts_no_step() -> None:
    assert 0.07 * 100 > 7, "the trap"
    assert adjustment_steps(100, interval=1, warmup=0.07, freeze=0.1).start == 7
    assert (1 - 0.42) * 50 > 29, "the trap"
    assert adjustment_steps(50, interval=1, warmup=0.1, freeze=0.42).stop == 29
    assert adjustment_steps(300, interval=1, warmup=1 / 3, freeze=1 / 3) == range(100, 200)


def test_a_short_run_has_no_adjustment() -> None:
    assert list(adjustment_steps(10, interval=20, warmup=0.1, freeze=0.1)) == []
    assert list(adjustment_steps(0, interval=20, warmup=0.1, freeze=0.1)) == []


@pytest.mark.parametrize(
    ("total", "interval", "warmup", "freeze", "message"),
    [
        (9, 1, -0.1, 0.1, "ranks.warmup is -0.1; give a share of the run from 0 to below 1"),
        (9, 1, 0.1, 1.0, "ranks.freeze is 1.0; give a share of the run from 0 to below 1"),
        (9, 1, float("nan"), 0.1, "ranks.warmup is nan; give a share of the run from 0 to below 1"),
        (
            9,
            1,
            0.9,
            0.1,
            "ranks.warmup 0.9 and ranks.freeze 0.1 leave no step to adjust ranks in; together they must be below 1",
        ),
        (9, 0, 0.1, 0.1, "ranks.interval is 0; give a whole number of optimizer steps, 1 or more"),
        (-1, 1, 0.1, 0.1, "the run has -1 optimizer steps; give 0 or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(
    total: int, interval: int, warmup: float, freeze: float, message: str
) -> None:
    with pytest.raises(SettingsError) as error:
        adjustment_steps(total, interval=interval, warmup=warmup, freeze=freeze)
    assert str(error.value) == message


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
