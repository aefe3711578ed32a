"""Days, drawn and frozen, hold the laws."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("trl", reason="the templates of most families come with trl")

from days.day import day
from days.live import DOORS, live

EVER = st.integers(0, 10**6)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=12, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(number=EVER)
def test_a_day_holds(number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = day(number)
    if not one.of_texts or one.door not in DOORS:
        return
    seen = live(one, tmp_path_factory.mktemp("day"))
    assert not seen.broken, f"day {number} ({one}):\n" + "\n".join(seen.broken)
