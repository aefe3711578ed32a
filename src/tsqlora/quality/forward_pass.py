"""One forward pass without dropout: losses, logits, and what the last linear layer is given.  METHOD 1."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.compat.peft import without_zero_updates
from tsqlora.data.batches import sorted_batches
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.oom import BatchSplitter, halves, retry_on_oom
from tsqlora.progress import Progress
from tsqlora.quality.features import Head, features_of, find_head, hidden_states, mean_state, recorded
from tsqlora.quality.journal import Journal, identity_of
from tsqlora.quality.reference import sample_losses
from tsqlora.quality.rows import Dataset, lengths_of
from tsqlora.quality.rule import Compute
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, model_logits, precision, split_labels
from tsqlora.tasks.generation import IGNORED, Generation

IN_MEMORY = 1 << 28
"""Bytes of a column above which it is memory-mapped, in half precision where it is of features."""

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """What the pass says of every row, in the data set's order."""

    labels: np.ndarray
    """Class ids or numbers; of generated text how many tokens the target has."""
    loss: np.ndarray
    logits: np.ndarray | None = None
    """n × k; None of generated text."""
    features: np.ndarray | None = None
    """n × d: what the head's last linear layer is given; None without such a layer."""
    dense: np.ndarray | None = None
    """What the layer before it is given, where that is new, too."""
    mean: np.ndarray | None = None
    """n × h: the mean of the last hidden states over a row's tokens; None unless it was requested and is there."""
    head: Head | None = None


def forward_pass(
    model: nn.Module,
    rows: Dataset,
    collate: Collate,
    *,
    task: Task,
    compute: Compute,
    lengths: Sequence[int] | None = None,
    hashes: Sequence[str] | None = None,
    mean: bool = False,
) -> tuple[Forward | None, Head | None]:
    """The pass, in the first process; and in all of them the head.

    Several processes share the rows. `collate` gives each sample a row of its own. With `mean` the rows' mean hidden
    states are measured, too.
    """
    with eval_mode(model):  # rows may draw random numbers, as augmentation does
        known = distributed.together(lambda: lengths_of(rows) if lengths is None else lengths)
    batches = sorted_batches([int(n) for n in known], compute.batch_size)
    device = next(model.parameters()).device
    exact = precision(device, compute.autocast, cache=False)
    with eval_mode(model), torch.no_grad(), without_zero_updates(model), exact:

        def find(size: int) -> Head | None:
            return _find(model, collate([rows[int(j)] for j in batches[0][:size]]), task)

        # Where one process cannot read its rows, all raise the error.
        head = distributed.together(lambda: retry_on_oom(find, halves(len(batches[0]))))
        journal, done = None, 0
        found = _Filled(len(rows))
        if compute.journal is not None:
            settings = {"pass": "forward", "batch size": compute.batch_size, "task": repr(task)}
            settings |= {"autocast": str(compute.autocast)}
            journal = Journal(compute.journal / "forward", identity_of(model, hashes or (), [], settings))
            for first, end, part in journal.parts():
                found.fill(np.concatenate(batches[first:end]), part)
                done = end
        measurer = _Pass(model, rows, collate, task, head, found, journal, mean)
        parts = distributed.to_first(distributed.together(lambda: measurer.run(batches, done, compute.progress)))
    for part in parts or ():
        for indices, columns in part:
            found.fill(indices, columns)
    return (Forward(**found.columns, head=head) if distributed.is_first() else None), head


@dataclass(frozen=True, slots=True)
class _Pass:
    model: nn.Module
    rows: Dataset
    collate: Collate
    task: Task
    head: Head | None
    found: "_Filled"
    journal: Journal | None
    mean: bool

    def run(
        self, batches: Sequence[np.ndarray], first: int, progress: Progress | None
    ) -> list[tuple[np.ndarray, Columns]]:
        """This process's batches from `first` on: the first process fills them in, what others measured goes there."""
        mine, portions = distributed.share(batches[first:]), BatchSplitter()
        parts = list[tuple[np.ndarray, Columns]]()
        done = sum(map(len, batches[:first]))
        total = done + sum(map(len, mine))
        for indices in mine:
            portioned = portions.of(indices, self.measured)
            columns = {name: np.concatenate([part[name] for part in portioned]) for name in portioned[0]}
            if self.journal is not None:
                self.journal.add(columns)
            if distributed.is_first():
                self.found.fill(indices, columns)
            else:
                parts.append((indices, columns))
            done += len(indices)
            if progress is not None:
                progress("look", done, total)
        return parts

    def measured(self, indices: np.ndarray) -> Columns:
        inputs, labels = split_labels(self.collate([self.rows[int(j)] for j in indices]), self.model)
        layers = [] if self.head is None else [x for x in (self.head.linear, self.head.dense) if x is not None]
        with recorded(layers) as seen, hidden_states(self.model if self.mean else None) as states:
            logits = model_logits(self.model, inputs, self.task)
        loss = sample_losses(self.task, logits, labels)
        if isinstance(self.task, Generation):
            tokens = self.task.targets(labels).ne(IGNORED).sum(1)
            return {name: _numpy(value) for name, value in {"labels": tokens, "loss": loss}.items()}
        columns = {"labels": labels, "loss": loss, "logits": logits}
        if self.head is not None:
            columns["features"] = features_of(seen, self.head.linear, logits)
            if self.head.dense is not None:
                columns["dense"] = seen[self.head.dense][0]
        if (mean := mean_state(states, inputs.get("attention_mask"))) is not None:
            columns["mean"] = mean
        return {name: _numpy(value) for name, value in columns.items()}


class _Filled:
    """Columns of n rows, filled part by part; large ones lie in a file that is gone with them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns: dict[str, np.ndarray] = {}

    def fill(self, indices: np.ndarray, part: Columns) -> None:
        for name, value in part.items():
            if name not in self.columns:
                self.columns[name] = empty((self.rows, *value.shape[1:]), value.dtype)
            self.columns[name][indices] = value


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in memory; a large matrix in half precision, memory-mapped."""
    if len(shape) < 2 or int(np.prod(shape)) * dtype.itemsize <= IN_MEMORY:
        return np.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:  # the map holds it open
        return np.memmap(file, dtype=np.float16, mode="w+", shape=shape)


def _find(model: nn.Module, batch: Mapping[str, Tensor], task: Task) -> Head | None:
    if isinstance(task, Generation):
        return None
    inputs, _ = split_labels(batch, model)
    return find_head(model, lambda: model_logits(model, inputs, task))


def _numpy(values: Tensor) -> np.ndarray:
    return (values.float() if values.is_floating_point() else values).numpy(force=True)
