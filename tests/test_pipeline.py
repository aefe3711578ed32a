"""What a run notes of how it went."""

from types import SimpleNamespace
from typing import Any

from tsqlora import pipeline


def test_a_run_resumed_with_other_libraries_notes_which() -> None:
    before = {"torch": "2.12", "peft": "0.21"}
    assert pipeline.other_versions(before, before) == []
    (note,) = pipeline.other_versions(before, {"torch": "2.13", "peft": "0.21"})
    assert note.startswith("begun with torch 2.12 and resumed with others")


def test_a_run_that_the_guard_turned_back_notes_why() -> None:
    told = {"guard": {"passed": False, "why": "labels would be wrong"}}
    data: Any = SimpleNamespace(scores=SimpleNamespace(record=told))
    quality: Any = SimpleNamespace(refused=None)
    assert pipeline.what_to_note(quality, data) == ["rows were drawn at random: labels would be wrong"]
    data.scores.record = {"guard": {"checked": False, "why": "rows are drawn evenly: no Q decides"}}
    assert pipeline.what_to_note(quality, data) == []
