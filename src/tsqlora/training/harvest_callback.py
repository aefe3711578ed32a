"""What training's own passes say of each row, in a stock Trainer: no pass of its own, a file at the end."""

import json
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import Scope
from tsqlora.quality.harvest import Harvest
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import Task, require_answers
from tsqlora.training.drawing import require_subset
from tsqlora.training.row_weights import labels_of, require_rows_seen, take_over, trained_task

HARVEST_FILE = "harvest.parquet"


class HarvestCallback(TrainerCallback):
    """Keeps each row's gradient norm, convergence, cosine, loss and EL2N as of the last time it was trained on.

    At the end they are written to `path`, by default harvest.parquet in the output_dir: id, label
    and terms of every row, null where a term is not known. They are not exact (dropout is on, weights move), and
    nothing is drawn by them: bench/harvest.py compares them with a pass of their own.

    Args:
        data: the Trainer's train_dataset.
        gradient: whether to look at gradients; loss and EL2N alone cost nothing.
        scope, task, ids: as in `tsqlora.score`.
    """

    def __init__(
        self,
        data: QualitySubset,
        *,
        gradient: bool = True,
        scope: Scope = "adapter",
        task: Task | None = None,
        ids: np.ndarray | None = None,
        path: str | Path | None = None,
    ) -> None:
        require_subset(data, "HarvestCallback")
        self.data, self.gradient, self.task, self.ids = data, gradient, task, ids
        self.scope: Scope = scope
        self.path = None if path is None else Path(path)
        self.harvest: Harvest | None = None
        self._watching = ExitStack()
        weakref.finalize(self, self._watching.close)  # where an epoch failed, at the latest on exit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        take_over(kwargs["model"], "HarvestCallback", self._watching)
        require_rows_seen(args, "HarvestCallback")
        if args.world_size > 1:
            raise SettingsError("HarvestCallback knows one process's rows only; leave it out with several processes")
        if state.global_step > 0:
            raise UnsupportedError(
                f"HarvestCallback keeps nothing in checkpoints, so rows trained on before step {state.global_step} "
                "would lack their terms; start anew, or resume without it"
            )
        model = kwargs["model"]
        task = require_answers(trained_task(args, model, self.task), "harvest")
        self.harvest = Harvest(model, labels_of(self.data), task=task, scope=self.scope, gradient=self.gradient)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.harvest is not None
        self._watching.enter_context(self.harvest.watch(kwargs["model"]))
        self._watching.enter_context(self.data.announcing(self.harvest.coming))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.data.weights is not None:
            raise UnsupportedError(
                "HarvestCallback reads gradients of rows that count alike, and the rows of this epoch have weights; "
                "leave it out, or leave out what gives weights (quality.unbiased, InfoBatchCallback)"
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watching.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watching.close()
        assert self.harvest is not None
        if state.is_world_process_zero:
            path = self.path or Path(str(args.output_dir)) / HARVEST_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(self.harvest, self.ids, path)


def _save(harvest: Harvest, ids: np.ndarray | None, path: Path) -> None:
    labels = harvest.labels.numpy()
    terms = {name: pa.array(values, from_pandas=True) for name, values in harvest.terms().items()}
    table = pa.table({"id": np.arange(len(labels)) if ids is None else ids, "label": labels, **terms})
    metadata = {b"tsqlora": json.dumps(harvest.record()).encode()}
    # Whole or not at all.
    unfinished = Path(f"{path}.tmp")
    pq.write_table(table.replace_schema_metadata(metadata), unfinished)
    unfinished.replace(path)
