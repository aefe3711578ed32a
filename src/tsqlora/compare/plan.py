"""What a comparison is of, and what it refuses to compare."""

import math
from dataclasses import dataclass
from pathlib import Path

from tsqlora import distributed
from tsqlora.compare.cells import Entry
from tsqlora.compare.run import Equal
from tsqlora.compat.hub import DatasetName, is_hub_id
from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.run.config import Config
from tsqlora.tasks import get_task
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.texts import TEXT_METRICS

EQUAL: tuple[Equal, ...] = ("steps", "epochs")


@dataclass(frozen=True, slots=True)
class Plan:
    """The cells of a comparison: every entry with every seed."""

    config: Config
    entries: list[Entry]
    seeds: list[int]
    equal: Equal
    metric: str
    sweep: tuple[float, ...]
    rates: dict[str, float]

    @property
    def cells(self) -> int:
        """How many cells there are; the first seed has one a rate of the sweep."""
        return len(self.entries) * (len(self.seeds) - 1 + max(1, len(self.sweep)))

    def rate(self, entry: Entry) -> float:
        """The learning rate that an entry has without a sweep."""
        by_method = self.rates.get(entry.method, self.config.training.learning_rate)
        return self.rates.get(entry.name, by_method)

    def require_possible(self) -> None:
        """Raises SettingsError and UnsupportedError for arguments and settings that no comparison can follow."""
        self._require_arguments()
        self._require_followed()
        self._require_measured()

    def _require_arguments(self) -> None:
        if not self.seeds:
            raise SettingsError("--seeds is empty; give at least one, such as 0,1,2")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise SettingsError(f"--seeds {seed}: it must be at least 0 and less than {2**32}")
        if self.equal not in EQUAL:
            raise SettingsError(f"--equal '{self.equal}' is unknown; {nearest(self.equal, EQUAL)}")
        if self.sweep and self.rates:
            raise SettingsError("--lr-sweep chooses learning rates, and --lr gives them; leave out one")
        for rate in (*self.sweep, *self.rates.values()):
            if not 0 < rate < math.inf:
                raise SettingsError(f"learning rate {rate} must be above 0 and finite")
        compared = {entry.name for entry in self.entries} | {entry.method for entry in self.entries}
        for name in self.rates:
            if name not in compared:
                raise SettingsError(f"--lr: '{name}' is not compared; {nearest(name, compared)}")

    def _require_followed(self) -> None:
        """Settings that compare, or one of its entries, would not follow."""
        config = self.config
        if distributed.launched() > 1:
            raise UnsupportedError("compare runs one training at a time in one process; start it without a launcher")
        if config.adapter.init_from is not None:
            raise UnsupportedError("compare trains every method from scratch; leave out adapter.init_from")
        if config.training.further_arguments().get("load_best_model_at_end"):
            raise SettingsError(
                "training.load_best_model_at_end needs checkpoints, and compare measures each training at its end "
                "without any; leave it out"
            )
        for entry in self.entries:
            if entry.policy == "quality" and not config.quality.enabled:
                raise SettingsError(
                    f"quality.enabled is false, and {entry.name} draws by quality; set it to true, or leave out "
                    f"{entry.name}"
                )

    def _require_measured(self) -> None:
        """A metric that no cell would have, or that a sweep would miss."""
        task, data = get_task(self.config.task.type), self.config.data
        of_texts = TEXT_METRICS if isinstance(task, Generation) else ()
        if self.metric not in (*task.measured, *of_texts):
            options = nearest(self.metric, (*task.measured, *of_texts))
            raise SettingsError(f"--metric '{self.metric}' is not measured for {task.name}; {options}")
        if self.metric not in of_texts:
            return
        # A directory, or a data set of the hub, may have a test split of its own.
        hub = DatasetName.of(data.train)
        whole = Path(data.train).expanduser().is_dir() or (hub.split is None and is_hub_id(hub.id))
        if not (data.test or whole) or data.format == "text":
            raise SettingsError(
                f"--metric '{self.metric}' compares generated texts with the targets of test rows, and there are none; "
                f"name data.test, with prompts and targets, or {nearest(self.metric, task.measured)}"
            )
        if self.sweep:
            raise SettingsError(
                f"--metric '{self.metric}' is not measured on validation rows, by which --lr-sweep chooses; "
                f"{nearest(self.metric, task.measured)}"
            )
