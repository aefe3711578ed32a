"""Complete checkpoints: their manifest lists every file with its size and hash.

The Trainer writes straight into checkpoint-N, and deletes old checkpoints before callbacks add their files. When these
are there, every file is synced to the disk and hashed, and the manifest renamed into place.
"""

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from tsqlora import distributed
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.files import digest, write_json
from tsqlora.libs.transformers import saved_note, set_deletion_order

MANIFEST_FILE = "tsqlora_manifest.json"
VERSION = 3
PENDING = -1
"""The size in a manifest of a file that another callback writes after it, whole or not at all."""
EARLIER = ".earlier"
"""Ends the name of another training's checkpoint: no step of this one writes there, and resuming never takes it."""
STATE_VERSION = 7
"""Of the callbacks' files. 6: one callback; 5: the question to the pool; 4: labels are judged once; 3: a look
before the first step, in place of a warm-up; 2: draws from named streams."""
STATE_FILE = "trainer_state.json"
"""The Trainer's own."""
NOTE = "tsqlora"
"""Our key in a Trainer's state."""


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


def begin_saves(args: TrainingArguments, state: TrainerState) -> tuple[int | None, Path | None]:
    """Begin the checkpoints of a training.

    Returns the step after which checkpoints in its folder are another training's, None where this process renames none,
    and the checkpoint that it resumes from, which is complete, as the best one is if it is to be brought back. Raises
    TsqLoraError naming the file that is damaged, or the folder that is of another run; SettingsError where there would
    be times without a complete checkpoint.
    """
    saves, note = require_resumable_saves(args), saved_note(state, NOTE)
    resumed = checkpoint_folder(args, state) if state.global_step > 0 else None
    if resumed is not None:
        _require_complete(resumed)
        if note_in(resumed).get("run") != note.get("run"):
            raise TsqLoraError(
                f"cannot resume: {resumed} is of another run than the checkpoint that was loaded; resume with the "
                "output_dir that it was written in"
            )
        # The Trainer forgets the best one where it is gone.
        best = json.loads((resumed / STATE_FILE).read_text())["best_model_checkpoint"]
        if args.load_best_model_at_end and best is not None:
            _require_complete(Path(best))
    # Unique for each training, also where two resume from the same checkpoint.
    note |= {"run": uuid.uuid4().hex, "rows": args.per_device_train_batch_size}
    return state.global_step if saves and distributed.is_first() else None, resumed


def write_manifest(folder: Path, *, also: Iterable[str] = ()) -> None:
    """Sync all files of a checkpoint to the disk, and write their manifest, which makes it complete.

    The files `also` may come later: without them it is not complete.
    """
    about: dict[str, Any] = {name: {"size": PENDING, "sha256": None} for name in also}
    for path in sorted(folder.rglob("*")):
        # What begins with a dot is left over from a write that was cut off.
        if path.is_file() and path.name != MANIFEST_FILE and not path.name.startswith("."):
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
            name = path.relative_to(folder).as_posix()
            about[name] = {"size": path.stat().st_size, "sha256": digest(path)}
    write_json(folder / MANIFEST_FILE, {"version": VERSION, "files": about})


def fault(folder: Path) -> str | None:
    """Why a checkpoint is not complete; None if it is."""
    if not folder.is_dir():
        return "it is not there"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if manifest["version"] not in (1, VERSION):  # 1 has the same; `read_state` decides whether training can go on
            return f"{MANIFEST_FILE} was written by another version of tsqlora"
        files = [(str(name), int(one["size"]), one["sha256"]) for name, one in manifest["files"].items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}: it was not finished, or not written for resuming"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, size, content in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if size != PENDING and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and was written with {size}"
        if size != PENDING and digest(path) != content:
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
    for _, checkpoint in (checkpoints := newest_first(folder)):
        why = fault(checkpoint)
        if why is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {why}")
    if any((checkpoint / MANIFEST_FILE).exists() for _, checkpoint in checkpoints):
        raise TsqLoraError(
            f"no checkpoint is complete: {'; '.join(passed_over)}; put a sound copy back, or start again elsewhere"
        )
    return None, passed_over


def note_in(checkpoint: Path) -> dict[str, Any]:
    """What a training noted in its state: `run`, unique for it, and the `rows` of a micro batch."""
    return json.loads((checkpoint / STATE_FILE).read_text())["stateful_callbacks"].get(NOTE, {})


def _require_complete(folder: Path) -> None:
    why = fault(folder)
    if why is None:
        return
    if not folder.is_dir():
        raise TsqLoraError(f"cannot resume: {folder} is not there; resume with the output_dir in which the run began")
    other = next((other for _, other in newest_first(folder.parent) if fault(other) is None), None)
    cure = "no other checkpoint there is complete; start again" if other is None else f"resume from {other}"
    raise TsqLoraError(f"cannot resume: {folder} is not complete: {why}; {cure}")


def set_aside(folder: Path, *, after: int) -> None:
    """Rename checkpoints of later steps: another training's, or never finished."""
    later = [path for step, path in newest_first(folder) if step > after]
    for path in later:
        shutil.rmtree(f"{path}{EARLIER}", ignore_errors=True)
        path.rename(f"{path}{EARLIER}")
    finished = [path.name for path in reversed(later) if Path(f"{path}{EARLIER}", MANIFEST_FILE).exists()]
    if finished and after == 0:  # whoever resumes has chosen to go back
        warnings.warn(
            f"{folder} has checkpoints of an earlier training that went further ({', '.join(finished)}): they are "
            f"renamed to checkpoint-N{EARLIER}, and save_total_limit deletes them first",
            stacklevel=4,
        )
    date_by_step(folder)


def date_by_step(folder: Path) -> None:
    """Date the checkpoints by their steps, those of an earlier training first: the Trainer deletes in this order."""
    set_deletion_order(
        [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*{EARLIER}"), *(path for _, path in reversed(newest_first(folder)))]
    )


def newest_first(folder: Path) -> list[tuple[int, Path]]:
    """The steps of the checkpoints in a folder, finished or not, with their paths; the newest first."""
    steps = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and path.is_dir()
    }
    return sorted(steps.items(), reverse=True)


ROWS_HASH = "hash of rows"
"""The option that tells data sets of one length apart."""


def require_options(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises SettingsError if an option differs from the one that the resumed run started with.

    Options that the checkpoint lacks are not compared.
    """
    for name, value in now.items():
        was = begun.get(name, value)
        if was != value and name == ROWS_HASH:
            raise SettingsError(
                "the rows differ from those of the checkpoint, or are in another order, and its scores go by row "
                "number; resume with the same data set in the same order, or start again in another directory"
            )
        if was != value:
            raise SettingsError(
                f"the resumed run had {name} {was}, and this one has {value}; resume with the run's own options, or "
                "start again in another directory"
            )


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write a callback's state into a checkpoint, in the first process."""
    if distributed.is_first():
        write_json(path, {"version": STATE_VERSION, **values})


def read_state(path: Path) -> dict[str, Any]:
    """Read a callback's state.  Raises TsqLoraError naming the file if it is missing or of another version."""
    if not path.exists():
        raise TsqLoraError(
            f"cannot resume: {path} is missing; resume from a complete checkpoint in the run's own output_dir, or "
            "start again"
        )
    values = json.loads(path.read_text())
    if values.pop("version", None) != STATE_VERSION:
        raise SettingsError(
            f"{path} was written by a version of tsqlora that draws other rows; resume with that version, or start "
            "again in another --out (output_dir)"
        )
    return values
