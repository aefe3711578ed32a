"""A run directory belongs to one run, and to one process at a time."""

from pathlib import Path

import pytest

from tsqlora.errors import SettingsError
from tsqlora.training.run_dir import CONFIG_FILE, LOCK_FILE, locked


def test_a_directory_is_made_and_free_again_after_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "deep" / "run"):
            assert (tmp_path / "deep" / "run" / LOCK_FILE).exists()


def test_a_held_lock_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(SettingsError, match=r"another process .*; wait for it, or name another --out"),
        locked(tmp_path / "run"),
    ):
        pass


def test_a_run_is_entered_only_to_resume_it(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("")
    with pytest.raises(SettingsError, match="holds another run; give --resume"), locked(tmp_path):
        pass
    with locked(tmp_path, resume=True):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_strange_directory_is_left_as_it_is(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(SettingsError, match=r"not empty \(letter\.txt\)"), locked(tmp_path, resume=resume):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot be written .*; name another directory"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("left", ["run.json", ".run.json.77", ".config.yaml.77"])
def test_a_run_killed_while_its_start_was_written_starts_again(left: str, tmp_path: Path) -> None:
    """Without a lock the same file is a stranger's."""
    (tmp_path / left).write_text("{")
    with pytest.raises(SettingsError, match="is not empty"), locked(tmp_path, resume=True):
        pass
    (tmp_path / LOCK_FILE).touch()
    with locked(tmp_path):
        pass
