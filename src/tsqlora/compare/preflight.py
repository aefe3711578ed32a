"""Before the first cell is trained: which rows there are, and whether every entry can be trained at all."""

import gc
import warnings
from collections.abc import Sequence
from dataclasses import replace

from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.run import Equal, rehearse, settings_of
from tsqlora.data.prepare import prepare
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.run.config import Config
from tsqlora.run.job import Job, load, load_model
from tsqlora.run.reading import read, writing_of


def preflight(
    config: Config, entries: Sequence[Entry], seed: int, *, known: Sequence[int], equal: Equal
) -> dict[int, str]:
    """The hash of the rows of each `known` seed, once every entry has been rehearsed with `seed`.

    A rehearsal builds the entry's model and begins its training, so that each method's own checks speak. Raises
    SettingsError and UnsupportedError naming the entry.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cells note them
        settings = _of_seed(config, seed)
        job = load(settings)
        for entry in entries:
            pretrained = load_model(settings, job.task, job.data.splits.labels)
            try:
                rehearse(replace(job, pretrained=pretrained), Cell(entry, seed, settings.training.learning_rate), equal)
            except (SettingsError, UnsupportedError) as error:
                raise type(error)(f"{entry.name}: {error}") from error
            finally:
                gc.collect()  # a Trainer holds its model in reference cycles
        return {seed: _hash(job, _of_seed(config, seed)) for seed in known}


def _of_seed(config: Config, seed: int) -> Config:
    return settings_of(config, Cell(Entry("lora", "all"), seed, config.training.learning_rate))


def _hash(job: Job, config: Config) -> str:
    """Of the rows of a seed, which decides them only where validation rows are split off."""
    if config.data.validation is not None or config.training.seed == job.config.training.seed:
        return job.data.hash
    return prepare(read(config), job.pretrained.tokenizer, max_length=job.max_length, writing=writing_of(config)).hash
