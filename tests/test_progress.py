"""Bars of long functions."""

import pytest
from transformers.utils import logging

from tsqlora.progress import bars


@pytest.mark.parametrize("off", [False, True])
def test_a_bar_follows_a_phase_whether_or_not_transformers_shows_bars(
    off: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        (logging.disable_progress_bar if off else logging.enable_progress_bar)()
        for at in (3, 7, 7, 10):
            bars(10)("features", at, 10)
        show = bars(10)
        for at in (3, 7, 10, 5, 10):  # a phase may come again
            show("features", at, 10)
    finally:
        logging.enable_progress_bar()
    assert ("features at 10 rows" in capsys.readouterr().err) is not off
