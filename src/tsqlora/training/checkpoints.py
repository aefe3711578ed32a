"""Complete checkpoints: their manifest lists every file, with size and hash.

The Trainer writes straight into checkpoint-N, and deletes old checkpoints before callbacks add their files. So the last
callback to add its part syncs every file to the disk, hashes it, and renames the manifest into place.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from tsqlora import distributed
from tsqlora.compat.transformers import saved_note, set_deletion_order
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.files import write_json

MANIFEST_FILE = "tsqlora_manifest.json"
VERSION = 1
EARLIER = ".earlier"
"""Ends the name of another training's checkpoint: no step of this one writes there, and resuming never takes it."""
NOTE = "tsqlora"
"""Our key in a Trainer's state."""


EPOCH_ERROR = 1e-6
"""The Trainer counts epochs as a float; a step is a larger part of one than this."""


def epoch_of(state: TrainerState) -> int:
    """The current epoch, or the next one between two."""
    return int((state.epoch or 0) + EPOCH_ERROR)


class Checkpoints:
    """The checkpoints that one training writes, each of which is complete once every registered part is in it.

    Where a training is resumed, its checkpoint is checked first, and the best one if it is to be brought back. Later
    checkpoints in the folder are another training's, and are renamed once this one begins.

    Raises TsqLoraError naming the file that is damaged, or the folder that is of another run; SettingsError where there
    would be times without a complete checkpoint.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState) -> None:
        saves = require_resumable_saves(args)
        self.parts: list[str] = []
        self.resumed = checkpoint_folder(args, state) if state.global_step > 0 else None
        """The checkpoint that the training resumes from."""
        self._folder: Path | None = None
        self._missing: set[str] = set()
        self._resumable = not args.save_only_model
        note = saved_note(state, NOTE)
        if self.resumed is not None:
            _require_resumable(args, self.resumed, note.get("run"))
        self._later = (Path(str(args.output_dir)), state.global_step) if saves and distributed.is_first() else None
        # Unique for each training, also where two resume from the same checkpoint.
        note |= {"run": uuid.uuid4().hex, "rows": args.per_device_train_batch_size}

    def set_aside_later(self) -> None:
        """Rename checkpoints of later steps, which are another training's.

        On epoch begin, not on train begin: a callback that refuses to begin leaves the folder as it was.
        """
        later, self._later = self._later, None
        if later is not None:
            folder, step = later
            _set_aside(folder, after=step)

    def complete(self, part: str, folder: Path) -> None:
        """A part is written into a checkpoint; the last one completes it."""
        if folder != self._folder or not self._missing:
            self._folder, self._missing = folder, {*self.parts}
        self._missing -= {part}
        if self._missing or not self._resumable:
            return
        distributed.wait()  # each process writes its own random state
        if distributed.is_first():
            write_manifest(folder)
            set_deletion_order(_in_deletion_order(folder.parent))


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the checkpoint of the current step; in a search, the newest, because each trial has its own folder."""
    folder, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    trials = folder.glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(trials, key=lambda path: path.stat().st_mtime_ns, default=folder / name)


def require_resumable_saves(args: TrainingArguments) -> bool:
    """Whether a run saves checkpoints that can be resumed.  Raises SettingsError if at times there would be none."""
    saves = args.save_strategy != SaveStrategy.NO and not args.save_only_model
    if saves and args.save_total_limit == 1:
        raise SettingsError(
            "save_total_limit 1 deletes the last complete checkpoint before the next one is; set it to 2 or more"
        )
    return saves


def write_manifest(folder: Path) -> None:
    """Sync all files of a checkpoint to the disk, and write their manifest."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_FILE]
    # What begins with a dot is left over from a write that was cut off.
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest(path, sync=True)}
        for path in paths
        if not path.name.startswith(".")
    }
    write_json(folder / MANIFEST_FILE, {"version": VERSION, "files": files})


def digest(path: Path, *, sync: bool = False) -> str:
    """A file's SHA-256; with `sync` it is on the disk first."""
    with open(path, "r+b" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def fault(folder: Path) -> str | None:
    """Why a checkpoint is not complete; None if it is."""
    if not folder.is_dir():
        return "it is not there"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if manifest["version"] != VERSION:
            return f"{MANIFEST_FILE} was written by another version of tsqlora"
        files = {str(name): (about["size"], about["sha256"]) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}: it was not finished, or not written for resuming"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, content) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and was written with {size}"
        if digest(path) != content:
            return f"{name} has other content than was written"
    return None


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a Trainer's output_dir, for `train(resume_from_checkpoint=...)`.

    None if no checkpoint was finished. Warns of newer ones that are passed over, with the reason. Raises TsqLoraError
    if all finished checkpoints are damaged; SettingsError, in the first process, if the folder does not exist.
    """
    if not Path(folder).is_dir() and distributed.is_first():
        raise SettingsError(f"{folder} is not there; give the run's output_dir")
    newest, passed_over = newest_complete(Path(folder))
    for why in passed_over:
        warnings.warn(why, stacklevel=2)
    return newest


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """`last_checkpoint` and its warnings; none if the folder does not exist."""
    passed_over: list[str] = []
    for checkpoint in (checkpoints := _newest_first(folder)):
        why = fault(checkpoint)
        if why is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {why}")
    if any((checkpoint / MANIFEST_FILE).exists() for checkpoint in checkpoints):
        raise TsqLoraError(
            f"no checkpoint is complete: {'; '.join(passed_over)}; put a sound copy back, or start again elsewhere"
        )
    return None, passed_over


def complete_before(folder: str | Path, step: int) -> Path | None:
    """The newest complete checkpoint of an earlier step than this one."""
    earlier = (path for path in _newest_first(Path(folder)) if _step_of(path) < step)
    return next((path for path in earlier if fault(path) is None), None)


def micro_batch_size(checkpoint: Path) -> int | None:
    """Rows of a micro batch when the checkpoint was written, or None."""
    return _state_of(checkpoint)["stateful_callbacks"].get(NOTE, {}).get("rows")


def _state_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text())


def _require_resumable(args: TrainingArguments, folder: Path, loaded: str | None) -> None:
    """Require that the checkpoint is complete, and the one that the Trainer has loaded."""
    _require_complete(folder)
    state = _state_of(folder)
    if state["stateful_callbacks"].get(NOTE, {}).get("run") != loaded:
        raise TsqLoraError(
            f"cannot resume: {folder} is of another run than the checkpoint that was loaded; resume with the "
            "output_dir that it was written in"
        )
    # The Trainer forgets the best one where it is gone.
    if args.load_best_model_at_end and (best := state["best_model_checkpoint"]) is not None:
        _require_complete(Path(best))


def _require_complete(folder: Path) -> None:
    why = fault(folder)
    if why is None:
        return
    if not folder.is_dir():
        raise TsqLoraError(
            f"cannot resume: {folder} is not there; resume with the output_dir that the run was begun in, where it was"
        )
    others = (other for other in _newest_first(folder.parent) if fault(other) is None)
    other = next(others, None)
    cure = "no other checkpoint there is complete; start again" if other is None else f"resume from {other}"
    raise TsqLoraError(f"cannot resume: {folder} is not complete: {why}; {cure}")


def _set_aside(folder: Path, *, after: int) -> None:
    """Rename checkpoints of later steps: another training's, or never finished."""
    later = [path for path in _newest_first(folder) if _step_of(path) > after]
    for path in later:
        shutil.rmtree(f"{path}{EARLIER}", ignore_errors=True)
        path.rename(f"{path}{EARLIER}")
    finished = [path.name for path in reversed(later) if Path(f"{path}{EARLIER}", MANIFEST_FILE).exists()]
    if finished and after == 0:  # whoever resumes has chosen to go back
        warnings.warn(
            f"{folder} has checkpoints of an earlier training that went further ({', '.join(finished)}): they are "
            f"renamed to checkpoint-N{EARLIER}, and the first that save_total_limit deletes",
            stacklevel=4,
        )
    set_deletion_order(_in_deletion_order(folder))


def _in_deletion_order(folder: Path) -> list[Path]:
    return [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*{EARLIER}"), *reversed(_newest_first(folder))]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _newest_first(folder: Path) -> list[Path]:
    """Newest step first."""
    steps = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and path.is_dir()
    }
    return [steps[number] for number in sorted(steps, reverse=True)]
