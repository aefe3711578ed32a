"""scripts/plain_english.py sees the old voice, and only that."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plain_english.py"
spec = importlib.util.spec_from_file_location("plain_english", SCRIPT)
assert spec is not None
assert spec.loader is not None
plain_english: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain_english)


@pytest.mark.parametrize(
    "planted",
    [
        '"""What is told of it."""',
        "# A half of them, drawn anew.",
        'raise ValueError("it is refused by name")',
        '"""A loop of one\'s own."""',
        "found = 1",
        "def asked() -> None: ...",
        "def f(given: int) -> None: ...",
        "for known in range(3): ...",
        "# It is level with LoRA.",
        "# Python 3.14 was not to be had.",
        '"""What ranks cost beside plain LoRA."""',
    ],
)
def test_the_old_voice_is_seen(planted: str) -> None:
    assert [finding.line for finding in plain_english.findings(Path("planted.py"), planted)] == [1]


@pytest.mark.parametrize(
    "plain",
    [
        '"""Find rows whose label the model knows with confidence, and keep the rest."""',
        "founded = found_rows = 1",
        'keys = {"told": "samples cannot be told apart"}',
        'print("label seems wrong; sorted by the file name")',
        "# The user gave no file, so the default is used.",
    ],
)
def test_plain_sentences_pass(plain: str) -> None:
    assert [*plain_english.findings(Path("plain.py"), plain)] == []


def test_a_count_that_grows_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed.json"
    allowed.write_text('{".": 1}')
    monkeypatch.setattr(plain_english, "ALLOWED", allowed)
    file = tmp_path / "a.py"
    monkeypatch.setattr("sys.argv", ["plain_english.py", str(file)])
    file.write_text("found = 1\n")
    plain_english.main()
    file.write_text("found = asked = 1\n")
    with pytest.raises(SystemExit, match="old voice"):
        plain_english.main()


def test_pages_are_checked_outside_of_their_code() -> None:
    page = (
        "# Title\n\n```bash\necho meanwhile\n```\n\nA run ends level, `meanwhile` it does not.\nA signal is an error.\n"
    )
    assert [finding.line for finding in plain_english.findings(Path("page.md"), page)] == [7, 8]
