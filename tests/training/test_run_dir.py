"""A run directory belongs to one run, and to one process at a time."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.run_dir import CONFIG_FILE, LOCK_FILE, dated, locked, written

LEFT = ("run.json", ".run.json.77", ".config.yaml.77")
"""What a run leaves that was killed while its start was written."""


def test_a_directory_is_made_and_free_again_after_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    for _ in range(2):
        with locked(run):
            assert (run / LOCK_FILE).exists()
            (run / "checkpoints").mkdir()
        assert not any(tmp_path.iterdir()), "nothing was written"
    with locked(run):
        (run / CONFIG_FILE).touch()
    with locked(run, resume=True):
        assert {path.name for path in run.iterdir()} == {LOCK_FILE, CONFIG_FILE}


def test_a_held_lock_of_another_process_is_refused_and_dies_with_it(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from tsqlora.run_dir import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SettingsError, match="another process"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


def test_a_run_without_out_has_a_directory_of_its_day_and_name(tmp_path: Path) -> None:
    def begun(source: str, **options: bool) -> str:
        run = dated(source, under=tmp_path, **options)
        run.mkdir(exist_ok=True)
        (run / CONFIG_FILE).touch()
        return run.name

    today = date.today().isoformat()
    assert begun("data/my rows!.csv") == f"{today}-my-rows"
    assert [begun("owner/name:mrpc[train]") for _ in range(3)] == [f"{today}-name{end}" for end in ("", "-2", "-3")]
    assert begun("name.jsonl", resume=True) == f"{today}-name-3"
    assert begun("other.csv", resume=True) == f"{today}-other"
    (tmp_path / "2020-01-01-name-9").mkdir()
    assert begun("name.jsonl", resume=True) == f"{today}-name-3"
    assert not dated("é/../..").is_absolute()


REFUSED: dict[str, tuple[tuple[str, ...], str, tuple[bool, ...], str]] = {
    "a run": ((CONFIG_FILE,), "", (False,), "holds another run; give --resume"),
    "checkpoints without settings": (
        (LOCK_FILE, "checkpoints/checkpoint-3/x"),
        "",
        (True,),
        r"has no config\.yaml, and checkpoints of a run; put it back, or name another",
    ),
    "a stranger's": (("letter.txt",), "", (False, True), r"not empty \(letter\.txt\)"),
    "a file": (("file",), "file", (False,), r"cannot be written .*; name another directory"),
    # As Python hands on the bytes of `ä` where the locale's encoding is ASCII.
    "no name": ((), "\udcc3\udca4", (False,), "is no name in this locale's encoding; set PYTHONUTF8=1"),
    **{f"{left} without a lock": ((left,), "", (True,), "is not empty") for left in LEFT},
}
"""Files that exist, the requested directory, whether to resume, and the error."""


@pytest.mark.parametrize(("there", "name", "resumes", "why"), REFUSED.values(), ids=REFUSED)
def test_a_directory_that_is_not_free_is_refused_and_left_as_it_is(
    there: tuple[str, ...], name: str, resumes: tuple[bool, ...], why: str, tmp_path: Path
) -> None:
    for file in there:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{")
    before = sorted(tmp_path.rglob("*"))
    for resume in resumes:
        with pytest.raises(SettingsError, match=why), locked(tmp_path / name, resume=resume):
            pass
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("left", [*LEFT, "checkpoints/runs/of tensorboard"])
def test_a_run_killed_while_its_start_was_written_starts_again(left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{")
    (tmp_path / LOCK_FILE).touch()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(lock: FileLock) -> None:
        Path(lock.lock_file).touch()
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match=r"a file system without locks \(No locks available\)"), locked(tmp_path):
        pass


# -------------------------------------------------------------------- a disk that takes no more


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "RUN/checkpoints"), "Read-only file system"),
        (RuntimeError("basic_ios::clear: iostream error"), "a file was cut off"),
    ],
)
def test_a_disk_that_takes_no_more_is_told_with_the_cure(error: Exception, why: str, tmp_path: Path) -> None:
    if isinstance(error, OSError) and error.filename:
        error.filename = str(tmp_path / "checkpoints")
    with (
        pytest.raises(TsqLoraError, match=rf"^{tmp_path} cannot be written: {why}.*the same command with --resume"),
        written(tmp_path),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes cannot be multiplied"),
        OSError(errno.EACCES, "Permission denied", "/data/train.jsonl"),
        SettingsError("inline_container.cc"),
    ],
)
def test_other_errors_are_left_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, written(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("writer", ["torch", "safetensors", "python"])
def test_each_writer_of_a_checkpoint_is_understood_when_no_more_can_be_written(writer: str, tmp_path: Path) -> None:
    """A limit on the size of files takes a full disk's place."""
    with pytest.raises(TsqLoraError, match="cannot be written: "), written(tmp_path), files_no_longer_than(100_000):
        write_with(writer, tmp_path)


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_with(writer: str, folder: Path) -> None:
    tensors = {"weight": torch.zeros(200_000)}
    if writer == "torch":
        torch.save(tensors, folder / "optimizer.pt")
    elif writer == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        (folder / "run.json").write_text("0" * 200_000)
