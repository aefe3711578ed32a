"""Every reader, given what strangers may write, reads it or refuses it in two lines; fuzz.py asks more often."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile import TARGETS, Case, varied
from watch import attempt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("target", TARGETS)
def test_no_file_gives_a_traceback_a_hang_or_a_write_elsewhere(target: str, folder: Path) -> None:
    strategy, run = TARGETS[target]

    @settings(max_examples=15)
    @given(strategy, st.integers(0, 2**32))
    def each(drawn: Case, seed: int) -> None:
        random = Random(seed)
        for case in [drawn, *(varied(drawn, random) for _ in range(5))]:
            outcome = attempt(run, case, folder)
            assert not outcome.broken, f"{outcome.kind}: {outcome.message}"

    each()


def test_the_watch_sees_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watch._STUCK", 0.1)

    def writes(folder: Path, case: Case) -> None:
        (tmp_path / "elsewhere").write_text("x")

    def raises(folder: Path, case: Case) -> None:
        raise KeyError("x")

    def hangs(folder: Path, case: Case) -> None:
        while True:
            pass

    def behaves(folder: Path, case: Case) -> None:
        (folder / "here").write_text((folder / "a").read_text())

    inside = tmp_path / "inside"
    inside.mkdir()
    case = Case({"a": b"1"})
    assert attempt(writes, case, inside).kind == "reached out"
    assert attempt(raises, case, inside).message.startswith("KeyError in ")
    assert "cut off" in attempt(hangs, case, inside).message
    assert attempt(behaves, case, inside).kind == "read"
    assert not list(inside.iterdir())
