"""An error's message has a line or two, and no control characters for the terminal."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import DataError, SettingsError, StoppedError, TsqLoraError, UnsupportedError, printable
from tsqlora.rows.readers import BrokenQuotesError
from tsqlora.rows.rows import MissingError


@given(st.text(), st.integers(10, 100))
def test_what_is_printed_is_printable_and_short(text: str, longest: int) -> None:
    shown = printable(text, longest)
    assert shown.isprintable()
    assert len(shown) <= longest + 3
    shown.encode()


@pytest.mark.parametrize("kind", [DataError, SettingsError, UnsupportedError])
def test_a_strangers_text_in_a_message_cannot_reach_the_terminal(kind: type[Exception]) -> None:
    message = str(kind("column '\x1b]0;owned\x07\u202e\ud800' is " + "x" * 10_000))
    assert message.startswith(r"column '\x1b]0;owned\x07\u202e\ud800' is xxx")
    assert len(message) < 1600


def test_plain_messages_stay_as_they_are() -> None:
    assert (
        str(DataError("rows.jsonl:3: no text in column 'Ünïcode'; ‖ΔW‖"))
        == "rows.jsonl:3: no text in column 'Ünïcode'; ‖ΔW‖"
    )


def _errors() -> list[TsqLoraError]:
    made: list[TsqLoraError] = [StoppedError("stopped", 15), MissingError("a.csv:3", "no text"), BrokenQuotesError("b")]
    return [*made, *(kind("why") for kind in (TsqLoraError, SettingsError, DataError, UnsupportedError))]


@pytest.mark.parametrize("error", _errors(), ids=lambda error: type(error).__name__)
def test_every_error_passes_between_processes(error: TsqLoraError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)
    assert vars(again) == vars(error)
