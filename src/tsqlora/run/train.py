"""A run from beginning to end: data, model, look, ranks, training, adapter, record."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tsqlora import distributed
from tsqlora.errors import DataError, SettingsError, TsqLoraError
from tsqlora.files import write_text
from tsqlora.oom import even_parts, is_out_of_memory, retry_on_oom
from tsqlora.progress import Progress
from tsqlora.run.callbacks import build_callbacks
from tsqlora.run.card import write_card
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.run.fit import arguments, begin, measure
from tsqlora.run.job import load
from tsqlora.run.preview import marked_samples
from tsqlora.run.start import with_start
from tsqlora.training.checkpoints import micro_batch_size, newest_complete, require_resumable_saves
from tsqlora.training.fit import fit
from tsqlora.training.record import RECORD_FILE, RunRecord
from tsqlora.training.run_dir import ADAPTER_DIR, CHECKPOINT_DIR, CONFIG_FILE, SCORES_FILE, locked, written
from tsqlora.training.stop import StopCallback

SHOWN = 2
"""Samples of a generating model that a dry run shows."""
GO_ON = "the same command with --resume goes on from the last complete checkpoint"


def train(config: Config, run: Path, *, resume: bool = False, progress: Progress | None = None) -> RunRecord:
    """Trains as the config says, into a run directory; returns what its run.json says.

    With `resume` an unfinished run goes on from its last complete checkpoint, and a finished one is
    left as it is.  Raises SettingsError where the directory holds another run.
    """
    config = with_start(config)
    args = arguments(config, run)
    if resume and (known := _begun(run, config)) is not None and known.status == "finished":
        return known  # nothing is written, not even a lock
    with locked(run, resume=resume) if distributed.is_first() else nullcontext():
        before = _begun(run, config) if resume else None
        if before is not None and before.status == "finished":
            return before
        stop = StopCallback(GO_ON)
        with written(run), distributed.explain_lost_peer(GO_ON), nullcontext() if args.save_only_model else stop:
            return fitting_in_memory(config, run, lambda rows: _train(config, run, rows, before, stop, progress))


def _train(
    config: Config, run: Path, rows: int, before: RunRecord | None, stop: StopCallback, progress: Progress | None
) -> RunRecord:
    """From the last complete checkpoint, or the beginning, to the end; a device takes so many rows at once."""
    args, progress = arguments(config, run, micro_batch_size=rows), stop.watch(progress)
    job = load(config)
    if before is not None and before.data["hash"] != job.data.hash:
        raise DataError(
            f"{config.data.train} or another file of data has other rows than when {run} was begun; name another --out"
        )
    method = build_callbacks(job, run / SCORES_FILE, progress)
    model, record = begin(job, args, method)
    checkpoint, passed_over = newest_complete(run / CHECKPOINT_DIR)
    for why in passed_over:
        warnings.warn(why, stacklevel=2)
    record.notes += passed_over
    if before is not None:
        record.notes += other_versions(before.versions, record.versions)
    if rows < config.training.batch_size:
        record.notes.append(_in_parts(config, rows))
    also = [WriteStart(run, config, record), stop]
    fit(model, args, method, job.inputs, record, also=also, resume_from=checkpoint, progress=progress, run=run)
    model.save_pretrained(str(run / ADAPTER_DIR), is_main_process=distributed.is_first())
    measure(job, model, record, args, progress)
    record.status = "finished"
    if distributed.is_first():
        record.save(run)
        write_card(run, run / ADAPTER_DIR)
    return record


def fitting_in_memory(config: Config, run: Path, work: Callable[[int], RunRecord]) -> RunRecord:
    """What `work` gives of as many rows at once as memory allows: a whole batch, or a part of it.

    It is called again where memory did not suffice, and goes on from the last checkpoint; a run that is resumed begins
    with what sufficed.
    """
    batch = config.training.batch_size
    if (processes := distributed.launched()) > 1:
        try:
            return work(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TsqLoraError(
                f"memory does not suffice for {batch} rows in each of {processes} processes; halve "
                "training.batch_size, double training.gradient_accumulation_steps, and name another --out"
            ) from error
    sizes, known = even_parts(batch), newest_complete(run / CHECKPOINT_DIR)[0]
    if known is not None and (before := micro_batch_size(known)) in sizes:
        sizes = sizes[sizes.index(before) :]
    return retry_on_oom(work, sizes, smaller=lambda rows: warnings.warn(_in_parts(config, rows), stacklevel=2))


def _in_parts(config: Config, rows: int) -> str:
    batch = config.training.batch_size
    return (
        f"memory does not suffice for {batch} rows at once: each batch is trained on in {batch // rows} parts of "
        f"{rows}; its rows, the steps and the schedule stay"
    )


def dry_run(config: Config) -> dict[str, Any]:
    """What `train` would do, with everything loaded and checked as it does; nothing is written."""
    job = load(with_start(config))
    args = arguments(job.config, Path("run"))
    require_resumable_saves(args)
    _, record = begin(job, args, build_callbacks(job, Path("run") / SCORES_FILE))
    notes = [note for note in record.notes if note not in record.plan["without_effect"]]
    told = {**record.plan, "columns": job.data.columns(), "max_length": job.max_length, "notes": notes}
    told["files"] = job.data.splits.dialects
    if job.data.splits.format is None:
        return told
    first = [job.data.samples["train"][j] for j in range(min(SHOWN, len(job.data.samples["train"])))]
    shown = marked_samples(job.pretrained.tokenizer, first)
    return {**told, "format": job.data.splits.format.name, "samples": shown}


class WriteStart(TrainerCallback):
    """Writes config.yaml and the record at the first step: until then nothing has begun that could be resumed."""

    def __init__(self, run: Path, config: Config, record: RunRecord) -> None:
        self.run, self.config, self.record = run, config, record

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not (self.run / CONFIG_FILE).exists():
            self.record.save(self.run)
            write_text(self.run / CONFIG_FILE, dump_config(self.config))


def other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What to note of a run that is resumed with other libraries than it was begun with."""
    changed = [f"{name} {version}" for name, version in before.items() if now.get(name) != version]
    if not changed:
        return []
    return [f"begun with {', '.join(changed)} and resumed with others: not every bit is as in one go"]


def _begun(run: Path, config: Config) -> RunRecord | None:
    """The record of the run that the directory holds, if there is one.

    Raises SettingsError if it has other settings, DataError if its record cannot be read.
    """
    if not (run / CONFIG_FILE).exists():
        return None
    if load_config(run / CONFIG_FILE) != config:
        raise SettingsError(f"{run} was begun with other settings: see {run / CONFIG_FILE}; name another --out")
    try:
        return RunRecord.load(run)
    except DataError:
        raise DataError(
            f"cannot resume: {run / RECORD_FILE} is missing or damaged; put a sound copy back, or name another --out"
        ) from None
