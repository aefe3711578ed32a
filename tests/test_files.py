"""Files are replaced whole, also behind a link."""

from pathlib import Path

import pytest

from tsqlora.files import write_text


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written(exists: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "x.txt", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    assert [*target.parent.iterdir()] == [target]
