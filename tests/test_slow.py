"""tests/slow.txt names tests that exist."""

from pathlib import Path

from slow import listed

ROOT = Path(__file__).parents[1]


def test_every_slow_test_exists() -> None:
    for entry in listed():
        file, _, test = entry.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test.rpartition('::')[2]}(" in text if test else text, f"{entry}: make slow FILES={file}"
