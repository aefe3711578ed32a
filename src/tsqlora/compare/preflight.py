"""Before the first cell is trained: which rows there are, and whether every entry can be trained at all."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tsqlora import distributed
from tsqlora.adapter.slots import find_slots
from tsqlora.baselines.methods import require_rival
from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.methods import METHODS, POLICIES, build
from tsqlora.compare.run import TRIAL_STEPS, Equal, planned_steps, settings_of
from tsqlora.data.prepare import prepare
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import find_sites
from tsqlora.quality.exact import require_exact
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.run.config import Config
from tsqlora.run.job import Job, arguments, load, load_model, ranks_half, require_drawable, with_slots
from tsqlora.run.plan import require_adjustments
from tsqlora.run.reading import read, writing_of
from tsqlora.training.quality_callback import SCORES_FILE, QualityCallback

FEW = 4
"""Rows on which it is seen whether a method's gradients can be had."""


def preflight(
    config: Config,
    entries: Sequence[Entry],
    seed: int,
    *,
    known: Sequence[int],
    equal: Equal,
) -> dict[int, str]:
    """The hashes of the rows of these known seeds.

    Raises SettingsError and UnsupportedError, which name the entry, for what its training would raise, and others
    would have been trained before. A model is built only where rows are scored by its gradients.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again, and are notes of the cells
        job, built = load(_of_seed(config, entries[0], seed)), set[str]()
        distributed.refuse_copies(arguments(job.config, Path("cell")).n_gpu)
        for number, entry in enumerate(entries):
            with _named(entry):
                if equal == "seconds" and number > 0:
                    _require_trial(job, entry)
                _require(job, entry, equal=equal, built=built)
        return {seed: _hash(job, _of_seed(config, entries[0], seed)) for seed in known}


def _of_seed(config: Config, entry: Entry, seed: int) -> Config:
    return settings_of(config, Cell(entry, seed, config.training.learning_rate), {})


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    try:
        yield
    except (SettingsError, UnsupportedError) as error:
        raise type(error)(f"{entry.name}: {error}") from error


def _require_trial(job: Job, entry: Entry) -> None:
    steps = _steps(job, entry, equal="epochs")
    if steps < TRIAL_STEPS.stop:
        raise SettingsError(
            f"the run has {steps} steps, and the trial by which seconds become steps takes {TRIAL_STEPS.stop}; raise "
            "training.epochs, or use --equal steps"
        )


def _steps(job: Job, entry: Entry, *, equal: Equal) -> int:
    return planned_steps(job.config, len(job.data.samples["train"]), Cell(entry, 0, 0.0), equal=equal)


def _require(job: Job, entry: Entry, *, equal: Equal, built: set[str]) -> None:
    config, rows = job.config, len(job.data.samples["train"])
    steps = _steps(job, entry, equal=equal)
    rival = METHODS[entry.method].rival
    if rival is not None:
        require_rival(
            rival,
            mean_rank=config.ranks.mean,
            max_rank=config.ranks.resolved_max(),
            steps=steps,
            rows=rows,
            batch_size=config.training.batch_size,
            label_smoothing=config.training.further_arguments().get("label_smoothing_factor", 0.0),
            model=job.pretrained.model,
        )
    else:
        _require_ranks(job, steps)
    quality = POLICIES[entry.policy](job, Path(SCORES_FILE), None).quality
    if quality is None:
        return
    require_drawable(job, quality)
    if equal != "seconds" and quality.warmup_epochs >= config.training.epochs:
        raise SettingsError(
            f"a warm-up of {quality.warmup:g} passes is {quality.warmup_epochs} epochs of {len(quality.data)} rows, "
            f"and the run has {config.training.epochs}: no scored epoch would be left; lower quality.warmup or raise "
            "training.epochs"
        )
    if entry.method not in built and any(term.gradient for term in quality.terms.values()):
        built.add(entry.method)
        _require_gradients(job, entry, quality, steps)


def _require_ranks(job: Job, steps: int) -> None:
    """Raises SettingsError for ranks that our own training would not begin with, or never move."""
    config, r = job.config, job.config.ranks
    ranks_half(job)  # knows its policy and its estimator
    require_adjustments(config, steps)
    if r.min > r.mean:  # where it is lower, the budget suffices
        pretrained, _ = load_model(config, job.data.splits.labels)
        shapes = {name: slots.shape for name, slots in find_slots(with_slots(config, pretrained)).items()}
        even = Sensitivity(dict.fromkeys(shapes, 1.0), shapes, "even", 0)
        allocate(even, mean_rank=r.mean, min_rank=r.min, max_rank=r.resolved_max(), gamma=r.gamma)


def _require_gradients(job: Job, entry: Entry, quality: QualityCallback, steps: int) -> None:
    """Raises UnsupportedError where samples' gradients cannot be had of the method's model."""
    pretrained, _ = load_model(job.config, job.data.splits.labels)
    # EVA's layers are LoRA's, and its own passes take long.
    method = "lora" if entry.method == "eva" else entry.method
    model = build(replace(job, pretrained=pretrained), method, steps=steps)[0].model
    batch = job.collate(list(job.data.samples["train"].samples[:FEW]))
    try:
        with eval_mode(model):
            require_exact(model, batch, job.task, find_sites(model, quality.scope), None)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"its rows are scored by gradients, which cannot be had of {entry.method}: {error}; or name a policy "
            "without gradients, such as loss, or leave it out"
        ) from error


def _hash(job: Job, config: Config) -> str:
    """Of the rows of a seed, which decides them only where validation rows are split off."""
    if config.data.validation is not None or config.training.seed == job.config.training.seed:
        return job.data.hash
    return prepare(read(config), job.pretrained.tokenizer, max_length=job.max_length, writing=writing_of(config)).hash
