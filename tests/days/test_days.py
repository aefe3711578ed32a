"""Days, drawn and frozen, hold the laws."""

import json
import math
import random
import re
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("trl", reason="the templates of most families come with trl")

from days.day import Day, day, rows_of, simpler
from days.doors import command
from days.families import FAMILIES, model_folder, tokenizer_of
from days.files import save
from days.frozen import lived, relied_on, stored
from days.live import live
from days.oracle import expected
from days.prepared import sample_of
from days.rows import Drawn
from linear import assert_linear

pytestmark = pytest.mark.filterwarnings("ignore")
MINUTE, FIVE = 60, 300
NUMBERS = st.integers(0, 10**6)
UNLUCKY = 0.05
"""Share of days on which a model without skill may accuse somebody."""


def held(number: int, unlucky: list[str]) -> None:
    """Live the day of a number; of one that breaks a law, the simplest day that breaks it too."""
    one = day(number)
    seen = lived(one)
    unlucky += [f"day {number}: {law}" for law in seen.unlucky[:1]]
    if seen.broken:
        least = simplest(one, seen.broken[0])
        raise AssertionError(f"python -m days {number}\n{one}\nsimplest: {least}\n" + "\n".join(seen.broken))


def simplest(one: Day, law: str, seconds: float = 60) -> Day:
    """Make parts of a day simpler, one after another, while it breaks the same law."""
    kind, end = _kind(law), time.monotonic() + seconds
    simpler_one: Day | None = one
    while simpler_one is not None:
        one, tries = simpler_one, simpler(simpler_one)
        simpler_one = next((t for t in tries if time.monotonic() < end and _breaks(t, kind)), None)
    return one


def _kind(law: str) -> str:
    return re.sub(r"[\d'\"/].*", "", law)


def _breaks(one: Day, kind: str) -> bool:
    try:
        return any(_kind(law) == kind for law in lived(one).broken)
    except Exception:  # not every mixture of parts is a day
        return False


def for_seconds(seconds: float, first: int) -> None:
    """Live the days from a number on, for so many seconds of the processor."""
    end, unlucky, number = time.process_time() + seconds, list[str](), first
    while time.process_time() < end:
        held(number, unlucky)
        number += 1
    n = number - first
    assert n > 5
    assert len(unlucky) <= UNLUCKY * n + 2 * math.sqrt(UNLUCKY * n), "\n".join(unlucky)


def test_days_hold_for_a_minute() -> None:
    for_seconds(MINUTE, 0)


def test_days_hold_for_five_minutes() -> None:
    for_seconds(FIVE, 200)


@pytest.mark.parametrize("name", stored())
def test_a_frozen_day_is_as_it_was(name: str) -> None:
    was = stored()[name]
    seen = lived(Day(**was.pop("day")))
    assert not seen.broken
    assert relied_on(seen) == was


@settings(max_examples=50, deadline=None, phases=[Phase.generate])
@given(number=NUMBERS)
def test_a_day_is_a_function_of_its_number(number: int) -> None:
    assert day(number) == day(number)
    random.seed(number + 1)
    assert str(rows_of(day(number))) == str(rows_of(day(number)))


def _audited(count: int, constant: str, folder: Path) -> float:
    """Seconds of the processor to audit so many rows."""
    one = Day(count, "chat" if constant == "system" else "prompt", "audit", lengths=16, constant=constant, rows=count)
    source = save("jsonl", folder, rows_of(one).rows)
    begin = time.process_time()
    outcome = command("audit", source, "--model", model_folder(one.family), "--no-model", "--out", folder / "audit")
    assert outcome.code == 0, outcome
    return time.process_time() - begin


def _prepared(count: int, constant: str, folder: Path) -> float:
    """Seconds of the processor to audit a prepared set beside its rows."""
    from datasets import Dataset

    one = Day(count, "chat", "prepared", lengths=16, constant=constant, rows=count)
    rows, tokenizer = rows_of(one).rows, tokenizer_of(one.family)
    made = [sample_of(right, tokenizer) for row in rows if (right := expected(row, "chat", tokenizer)) is not None]
    Dataset.from_list([sample for sample in made if sample is not None]).save_to_disk(str(folder / "set"))
    source, model = save("jsonl", folder, rows), model_folder(one.family)
    begin = time.process_time()
    options = ("--model", model, "--data", source, "--no-model", "--out", folder / "audit")
    assert command("audit", "--prepared", folder / "set", *options).code == 0
    return time.process_time() - begin


@pytest.mark.parametrize(
    ("work", "constant"),
    [
        *((_audited, constant) for constant in ("", "instruction", "schema", "system")),
        *((_prepared, constant) for constant in ("instruction", "system")),
    ],
)
def test_twice_the_rows_take_at_most_two_and_a_half_times_the_time(
    work: Callable[[int, str, Path], float], constant: str, tmp_path: Path
) -> None:
    def spent(count: int) -> float:
        return work(count, constant, Path(mkdtemp(dir=tmp_path)))

    spent(100)
    assert_linear(spent, 400)


REAL = {
    "alpaca": "alpaca",
    "scitldr": "summary",
    "xsum": "summary",
    "sst2": "class numbers",
    "clinc150": "classes",
    "cola": "class numbers",
    "goemotions": "label sets",
    "mrpc": "text pairs",
    "rte": "text pairs",
    "stsb": "numbers",
    "wnut17": "tags",
}
"""The kinds of rows in ../shared/data."""


@pytest.mark.parametrize(
    ("name", "door"), [*zip(REAL, cycle(["audit", "train"]), strict=False), ("alpaca", "train"), ("sst2", "audit")]
)
def test_real_rows_hold(name: str, door: str, shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "data" / name / "train.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    count = 600 if name == "clinc150" else 120  # of 150 classes
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    family = random.Random(f"{name} {door}").choice([*FAMILIES])
    one = Day(0, REAL[name], door, family=family, rows=len(rows), fault="real")
    # Their faults are their own: no law says which rows are clean.
    seen = live(one, tmp_path, Drawn(rows, rows[:4], {place: set() for place in range(len(rows))}))
    assert not seen.broken
    assert not [name for name, one in seen.findings.items() if isinstance(one, list) and one[0] == "error"]
