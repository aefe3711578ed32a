"""Score rows for any trainer: files of any size, with a config's model or a run's weights, resumable."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tsqlora import distributed
from tsqlora.auditing.look import score
from tsqlora.auditing.scores import Scores
from tsqlora.errors import SettingsError
from tsqlora.files import writing
from tsqlora.model.named import read, trained_task
from tsqlora.model.request import Compute, require_terms
from tsqlora.progress import Progress
from tsqlora.rows.sources import open_table
from tsqlora.rows.splits import held_out_rows
from tsqlora.rows.table import stored_in
from tsqlora.rows.write import require_place
from tsqlora.run_dir import CONFIG_FILE, alone_in
from tsqlora.settings import PRESETS, load_config
from tsqlora.training.job import load, open_run, scoring_rule, with_start


def score_rows(
    source: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Scores:
    """The terms of every training row that the rule weighs, with the initial model of a config or the weights of a run.

    Without data.validation, the validation rows that training would hold out are left out here too (`held_out` in the
    scores' record); for a run and another file in data.train every row is scored.
    Rows are read in chunks and samples stored on disk. OUT.partial has the progress until the scores are written: the
    same call after an interruption resumes, and writes the same file.
    Raises SettingsError if another process uses OUT.partial.
    """
    if (processes := distributed.launched()) > 1:
        raise SettingsError(
            f"scoring runs as one process and was started as {processes}; start one, or train with quality.enabled, "
            "which shares the scoring"
        )
    require_place(out)
    with writing(out), _partial(out) as (partial, tokens), stored_in(tokens):
        if source.is_dir():
            job = open_run(source, overrides)
            assert job.record is not None
            path = job.config.data.train
            if path == load_config(source / CONFIG_FILE, trained=True).data.train:
                tables = read(job.config, job.record.labels)  # as training split them
            else:
                tables = {"train": job.complete(open_table(path, split="train", hints=job.config.data.hints))}
            job = job.with_files(tables)
        else:
            config = with_start(load_config(source, overrides))
            if not config.quality.enabled:
                raise SettingsError("quality.enabled is false, so there is nothing to score; set it to true")
            require_terms(PRESETS[config.quality.preset] or {}, trained_task(config))
            job = load(config, scoring=True).with_adapter().on_device()
        scores = score(
            job.model,
            job.train.samples,
            job.collate,
            rule=scoring_rule(job.config),
            task=job.task,
            rows=job.row_names(held_out=held_out_rows(job.data)),
            compute=Compute(job.config.training.batch_size, parts=partial / "scoring", progress=progress),
            trusted=job.trusted,
        )
        scores.save(out)
    return scores


@contextmanager
def _partial(out: Path) -> Iterator[tuple[Path, Path]]:
    """OUT.partial, removed at success, and a folder in it for samples, always removed."""
    partial = Path(f"{out}.partial")
    tokens = partial / "tokens"
    with alone_in(partial, busy=f"another process is scoring into {out}; wait for it, or choose another --out"):
        shutil.rmtree(tokens, ignore_errors=True)
        tokens.mkdir()
        try:
            yield partial, tokens
            shutil.rmtree(partial)
        finally:
            shutil.rmtree(tokens, ignore_errors=True)
