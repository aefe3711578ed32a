"""Train a run from settings to adapter and record."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.adapter.doctor import faults_in
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.files import write_text
from tsqlora.model.oom import even_parts, is_out_of_memory, retry_on_oom
from tsqlora.progress import Progress
from tsqlora.record import RunRecord
from tsqlora.rows.readers import PLAIN
from tsqlora.rows.table import data_hash
from tsqlora.run_dir import ADAPTER_DIR, CHECKPOINT_DIR, CONFIG_FILE, RECORD_FILE, SCORES_FILE, locked, written
from tsqlora.settings import Config, dump_config, load_config
from tsqlora.training.check import write_contract
from tsqlora.training.checkpoints import newest_complete, note_in, require_resumable_saves
from tsqlora.training.export import write_card
from tsqlora.training.fit import fit, save_adapter
from tsqlora.training.job import load, method_of, with_start
from tsqlora.training.run import arguments, begin, measure, shown_samples
from tsqlora.training.stop import StopCallback

SHOWN = 2
"""Samples of a generating model in a dry run."""
HOW_TO_RESUME = "the same command with --resume continues from the last complete checkpoint, or starts if there is none"


def train(
    config: Config,
    run: Path,
    *,
    look: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RunRecord:
    """Train into a run directory, by a `look` in a folder if there is one; return the record in its run.json.

    With `resume` an unfinished run continues from its last complete checkpoint, and a finished one stays as it is.
    `say` gets a line about the rows, the step from which a resumed run goes on, or that the run is finished.
    Raises SettingsError if the directory holds another run.
    """
    config = with_start(config)
    distributed.warn_of_one_process()
    record = _started(run, config) if resume else None
    if look is None and record is not None and record.plan.get("look"):
        look = Path(record.plan["look"])
    engine, q = distributed.sharding(config.training.further_arguments()), config.quality
    if engine is not None and look is None and (q.enabled or q.head_start):
        raise SettingsError(
            f"{engine} shards the model, and a look needs a whole one; type `tsqlora look CONFIG --out LOOK`, then "
            "this command with `--look LOOK` (or set quality.enabled and quality.head_start to false)"
        )
    args = arguments(config, run)  # sets the engine up
    if record is not None and record.status == "finished":
        say(f"the run in {run} is finished, so nothing is trained; another --out trains again")
        return record  # nothing is written, not even a lock
    with locked(run, resume=resume) if distributed.is_first() else nullcontext():
        before = _started(run, config) if resume else None
        if before is not None and before.status == "finished":
            return before
        stop = StopCallback(HOW_TO_RESUME)
        with (
            written(run),
            distributed.explain_lost_peer(HOW_TO_RESUME),
            nullcontext() if args.save_only_model else stop,
        ):
            work, batch = partial(_train, config, run, look, before, stop, progress, say), config.training.batch_size
            if (processes := distributed.launched()) > 1:
                try:
                    return work(batch)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise TsqLoraError(
                        f"memory does not suffice for {batch} rows in each of {processes} processes; halve "
                        "training.batch_size, double training.gradient_accumulation_steps, and use another --out"
                    ) from error
            # A whole batch at once, or parts of it; after running out of memory from the last checkpoint on.
            sizes, checkpoint = even_parts(batch), newest_complete(run / CHECKPOINT_DIR)[0]
            if checkpoint is not None and (least := note_in(checkpoint).get("rows")) in sizes:
                sizes = sizes[sizes.index(least) :]
            return retry_on_oom(work, sizes, smaller=lambda rows: warnings.warn(_in_parts(config, rows), stacklevel=2))


def _train(
    config: Config,
    run: Path,
    look: Path | None,
    before: RunRecord | None,
    stop: StopCallback,
    progress: Progress | None,
    say: Callable[[str], None],
    rows: int,
) -> RunRecord:
    """Train from the last complete checkpoint, or from the start; a device takes `rows` rows at once."""
    args, progress = arguments(config, run, micro_batch_size=rows), stop.watch(progress)
    job = load(config, labels=None if before is None else before.labels, say=say)
    if before is not None and before.data["hash"] != data_hash(job.data):
        raise DataError(
            f"the rows of {config.data.train} or another file changed since {run} started; use another --out"
        )
    method, job = method_of(job, run / SCORES_FILE, progress, look=look), job.with_adapter()
    record = begin(job, args, method)
    record.plan |= {} if look is None else {"look": str(look)}
    checkpoint, passed_over = newest_complete(run / CHECKPOINT_DIR)
    if checkpoint is not None:
        if method.ranks is not None and distributed.sharding(config.training.further_arguments()):
            raise UnsupportedError(
                f"ranks that move cannot resume from {checkpoint} under FSDP; start again, or set ranks.policy: fixed"
            )
        say(f"goes on from step {checkpoint.name.rpartition('-')[2]} of {record.plan['steps']:,}")
    elif before is not None:
        say("goes on from step 0: there is no checkpoint yet")
    for why in passed_over:
        warnings.warn(why, stacklevel=2)
    record.notes += passed_over
    was = {} if before is None else before.versions
    if changed := [f"{name} {version}" for name, version in was.items() if record.versions.get(name) != version]:
        record.notes.append(
            f"started with {', '.join(changed)} and resumed with others: results may differ in their last bits"
        )
    if rows < config.training.batch_size:
        record.notes.append(_in_parts(config, rows))
    also = [WriteStart(run, config, record), stop]
    how = {"also": also, "resume_from": checkpoint, "progress": progress, "run": run}
    save_adapter(fit(job, args, method, record, **how), run / ADAPTER_DIR)
    if distributed.is_first():
        for fault in faults_in(run / ADAPTER_DIR):
            warnings.warn(f"the saved adapter has a fault: {fault}", stacklevel=2)
            record.notes.append(fault)
    measure(job, record, args, progress)
    if distributed.is_first():
        record.save(run)
        write_card(run, run / ADAPTER_DIR)
        write_contract(job, run)
    return record


def _in_parts(config: Config, rows: int) -> str:
    batch = config.training.batch_size
    return (
        f"memory does not suffice for {batch} rows at once: each batch is computed in {batch // rows} parts of "
        f"{rows}; batches, steps and schedule stay the same"
    )


def dry_run(config: Config, look: Path | None = None) -> dict[str, Any]:
    """The plan of `train`, with everything loaded and checked; nothing is written."""
    job = load(with_start(config))
    args = arguments(job.config, Path("run"))
    require_resumable_saves(args)
    method, job = method_of(job, Path("run") / SCORES_FILE, look=look), job.with_adapter()
    record = begin(job, args, method)
    notes = [note for note in record.notes if note not in record.plan["without_effect"]]
    plan = {**record.plan, "columns": asdict(job.train.columns), "max_length": job.max_length, "notes": notes}
    plan["files"] = {table.name: str(table.dialect) for table in job.data.values() if table.dialect != PLAIN}
    if job.train.format is None:
        return plan
    shown = shown_samples(job.tokenizer, job.train.samples[:SHOWN])
    return {**plan, "format": job.train.format.name, "samples": shown}


class WriteStart(TrainerCallback):
    """Write config.yaml and the record at the first step: before it there is nothing to resume."""

    def __init__(self, run: Path, config: Config, record: RunRecord) -> None:
        self.run, self.config, self.record = run, config, record

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not (self.run / CONFIG_FILE).exists():
            self.record.save(self.run)
            write_text(self.run / CONFIG_FILE, dump_config(self.config))


def _started(run: Path, config: Config) -> RunRecord | None:
    """The record of the run in the directory, if any.

    Raises SettingsError if it has other settings, DataError if its record is damaged.
    """
    if not (run / CONFIG_FILE).exists():
        return None
    before = load_config(run / CONFIG_FILE)
    if before != config:
        old, new = before.model_dump(), config.model_dump()
        differ = [
            f"{part}.{name} was {old[part].get(name)!r}, and is {new[part].get(name)!r}"
            for part in old
            for name in {**old[part], **new[part]}
            if old[part].get(name) != new[part].get(name)
        ]
        raise SettingsError(f"{run} has other settings: {'; '.join(differ)}; use another --out")
    try:
        return RunRecord.load(run)
    except DataError:
        raise DataError(
            f"cannot resume: {run / RECORD_FILE} is missing or damaged; restore it, or use another --out"
        ) from None
