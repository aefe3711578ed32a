"""Which checkpoints are whole: those with a manifest, whose files are all as it says.

The Trainer writes straight into checkpoint-N, and deletes old checkpoints before callbacks add their files. So the last
of our callbacks to add its own syncs every file to the disk, hashes it, and puts the manifest there by a rename.
"""

import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from tsqlora import distributed
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.files import write_json

MANIFEST_FILE = "tsqlora_manifest.json"
VERSION = 1
TRAINER_STATE_FILE = "trainer_state.json"
SECOND = 10**9
"""In nanoseconds."""


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of the step that it is at."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def require_whole_checkpoints(args: TrainingArguments) -> bool:
    """Whether a run saves what can be resumed.  Raises SettingsError where there would be times without any."""
    saves = args.save_strategy != SaveStrategy.NO and not args.save_only_model
    if saves and args.save_total_limit == 1:
        raise SettingsError(
            "save_total_limit 1 deletes the last whole checkpoint before the next one is; set it to 2 or more"
        )
    return saves


def announce(args: TrainingArguments, state: TrainerState, part: str) -> None:
    """On train begin: whoever calls this will add a part to every checkpoint, and seal it.

    Where a run is resumed, its checkpoint is checked, and the best one if it is to be brought back. Raises TsqLoraError
    naming the file that is damaged, or the folder that is of another run; SettingsError where two callbacks add one
    part, and where there would be times without a whole checkpoint.
    """
    saves = require_whole_checkpoints(args)
    if saves and state.is_hyper_param_search:
        raise SettingsError(
            "hyperparameter_search saves each trial in a folder of its own, of which callbacks are not told; set "
            "save_strategy to 'no', and train once more with the best values"
        )
    # The Trainer's own place for what callbacks know; it is one for all of them, and begins anew with each training.
    parts = cast(dict[str, Any], state.stateful_callbacks)
    if parts.get("tsqlora", {}).get("begun") != state.global_step:
        if state.global_step > 0:
            _require_resumable(args, checkpoint_folder(args, state), _run_of(parts))
        if saves and distributed.is_first():
            date_by_step(Path(str(args.output_dir)), past=state.global_step)
        # Each training has a name of its own, also one that goes on from the same checkpoint as another.
        parts["tsqlora"] = {
            "run": uuid.uuid4().hex,
            "rows": args.per_device_train_batch_size,
            "begun": state.global_step,
            "parts": [],
            "open": [],
        }
    if part in parts["tsqlora"]["parts"]:
        raise SettingsError(f"the Trainer has two callbacks for {part}; give it one of each kind at most")
    parts["tsqlora"]["parts"].append(part)


def seal(args: TrainingArguments, state: TrainerState, part: str) -> None:
    """On save, once a part is written: with the last one the checkpoint is whole."""
    known = cast(dict[str, Any], state.stateful_callbacks)["tsqlora"]
    known["open"] = [other for other in known["open"] or known["parts"] if other != part]
    if known["open"] or args.save_only_model:
        return
    distributed.wait()  # each process writes its own random state
    if distributed.is_first():
        folder = checkpoint_folder(args, state)
        write_manifest(folder)
        date_by_step(folder.parent)


def date_by_step(folder: Path, *, past: int | None = None) -> None:
    """Dates each checkpoint's folder by its step, in seconds since 1970; those of steps after `past` in nanoseconds.

    The Trainer deletes the one with the oldest date: where the clock was set back that would be the newest. Steps after
    the one at which a training begins are another training's: they go first, and are never taken for the newest.
    """
    for path in _newest_first(folder):
        other = _is_anothers(path) if past is None else _step_of(path) > past
        date = _step_of(path) * (1 if other else SECOND)
        os.utime(path, ns=(date, date))


def _is_anothers(checkpoint: Path) -> bool:
    """Whether it was there, further on, when the training of its folder began."""
    return checkpoint.stat().st_mtime_ns < SECOND


def write_manifest(folder: Path) -> None:
    """Syncs what is in a checkpoint to the disk, and says that this is all of it."""
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
    """Why a checkpoint is not whole; None if it is."""
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
    """The newest whole checkpoint in a Trainer's output_dir, for `train(resume_from_checkpoint=...)`.

    None where no checkpoint was ever finished: training begins anew. Warns of newer ones that are passed over, and says
    why. Raises TsqLoraError where checkpoints were finished, and all of them are damaged; in the first process, whose
    Trainer makes the folder, SettingsError where it is not there.
    """
    if not Path(folder).is_dir() and distributed.is_first():
        raise SettingsError(f"{folder} is not there; give the output_dir of the run, which Trainer(...) makes")
    found, passed_over = newest_whole(Path(folder))
    for why in passed_over:
        warnings.warn(why, stacklevel=2)
    return found


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """As `last_checkpoint`, with what it would warn of; none where the folder is not there."""
    passed_over: list[str] = []
    for checkpoint in (checkpoints := _newest_first(folder)):
        why = fault(checkpoint)
        if why is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {why}")
    if any((checkpoint / MANIFEST_FILE).exists() for checkpoint in checkpoints):
        raise TsqLoraError(
            f"no checkpoint is whole: {'; '.join(passed_over)}; put a sound copy of one back, or start anew elsewhere"
        )
    return None, passed_over


def whole_before(folder: str | Path, step: int) -> Path | None:
    """The newest whole checkpoint of an earlier step than this one."""
    earlier = (path for path in _newest_first(Path(folder)) if _step_of(path) < step)
    return next((path for path in earlier if fault(path) is None), None)


def rows_at_once(checkpoint: Path) -> int | None:
    """How many a device took when the checkpoint was written, if that is known."""
    told = json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
    return told["stateful_callbacks"].get("tsqlora", {}).get("rows")


def _require_resumable(args: TrainingArguments, folder: Path, loaded: str | None) -> None:
    """That what callbacks will read is whole, and of the training whose checkpoint the Trainer has loaded."""
    _require_whole(folder)
    told = json.loads((folder / TRAINER_STATE_FILE).read_text())
    if _run_of(told["stateful_callbacks"]) != loaded:
        raise TsqLoraError(
            f"cannot resume: {folder} is of another run than the checkpoint that was loaded; resume with the "
            "output_dir that it was written in"
        )
    # The Trainer forgets the best one where it is gone.
    if args.load_best_model_at_end and (best := told["best_model_checkpoint"]) is not None:
        _require_whole(Path(best))


def _run_of(parts: dict[str, Any]) -> str | None:
    """The name of the training that wrote a Trainer's state, if callbacks of ours were in it."""
    return parts.get("tsqlora", {}).get("run")


def _require_whole(folder: Path) -> None:
    why = fault(folder)
    if why is None:
        return
    if not folder.is_dir():
        raise TsqLoraError(
            f"cannot resume: {folder} is not there; resume with the output_dir that the run was begun in, where it was"
        )
    others = (other for other in _newest_first(folder.parent) if fault(other) is None)
    whole = next(others, None)
    cure = "no other checkpoint there is whole, start anew" if whole is None else f"resume from {whole}"
    raise TsqLoraError(f"cannot resume: {folder} is not whole: {why}; {cure}")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _newest_first(folder: Path) -> list[Path]:
    """By their steps, behind them those that were left by another training."""
    found = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and path.is_dir()
    }
    return sorted((found[number] for number in sorted(found, reverse=True)), key=_is_anothers)
