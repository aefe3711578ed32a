"""Files are replaced whole, also behind a link."""

import errno
import os
from pathlib import Path

import pytest

from tsqlora.errors import SettingsError
from tsqlora.files import replacing, write_text
from tsqlora.rows.sources import open_table
from tsqlora.rows.write import copy_rows, require_place, write_rows


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


def test_a_link_into_a_directory_that_is_not_there_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "x.txt")
    write_text(link, "new")
    assert (link.is_symlink(), link.read_text()) == (False, "new")


def test_a_device_is_no_file_to_write() -> None:
    with pytest.raises(SettingsError, match="device"):
        require_place(Path(os.devnull))


@pytest.mark.parametrize("refuses", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_takes_files_all_the_same(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, handles = {"open": os.open, "fsync": os.fsync}, list[int]()

    def refuse(at: int | str | Path, *more: int) -> int | None:
        if os.path.isdir(at):
            handles.extend([at] if isinstance(at, int) else [])
            raise OSError(errno.EINVAL, "refused")
        return real[refuses](at, *more)  # type: ignore[operator, arg-type]

    monkeypatch.setattr(os, refuses, refuse)
    write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "new"
    for handle in handles:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_rows_and_pages_are_readable_by_their_owner_alone_unless_the_file_was_open_before(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        write_rows(tmp_path / name, [{"text": "secret"}])
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        (tmp_path / name).chmod(0o644)
        write_rows(tmp_path / name, [{"text": "secret"}])
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
    copy_rows(open_table(tmp_path / "a.jsonl"), tmp_path / "b.jsonl")
    write_text(tmp_path / "page.html", "secret", private=True)
    with replacing(tmp_path / "c.txt", private=True) as unfinished:
        assert unfinished.stat().st_mode & 0o777 == 0o600, "also while it is written"
    assert {path.stat().st_mode & 0o777 for path in map(tmp_path.joinpath, ("b.jsonl", "page.html", "c.txt"))} == {
        0o600
    }
