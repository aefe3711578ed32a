"""The pass: one engine for everything that is measured over rows.

Batches have rows of like length. The model is in evaluation mode. A batch that does not fit in memory is split,
several processes share the batches, and a pass that was cut off goes on after the parts that are on disk.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tsqlora import distributed
from tsqlora.errors import SettingsError
from tsqlora.files import replacing
from tsqlora.libs.torch import plain_parts
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.oom import BatchSplitter
from tsqlora.model.request import Compute
from tsqlora.rows.batches import sorted_batches
from tsqlora.rows.datasets import Dataset
from tsqlora.tasks import Batch, Collate
from tsqlora.tasks.forward import precision

IN_MEMORY = 1 << 28
"""Bytes above which a matrix is memory-mapped, in half precision."""
HALF = 6e4
"""Half precision ends at 65,504."""
FLUSH_SECONDS = 5.0
"""An interruption may cost this much work."""
LARGE = ("features", "dense", "mean")
"""Columns that only the first process has; in the others they have no rows."""

Columns = Mapping[str, np.ndarray]


def run_pass(
    model: nn.Module,
    measure: Callable[[np.ndarray, Batch], Columns],
    dataset: Dataset,
    collate: Collate,
    compute: Compute,
    *,
    lengths: Sequence[int] | None = None,
    phase: str = "",
    first: Batch | None = None,
    parts: Path | None = None,
    shared: bool = False,
) -> dict[str, np.ndarray]:
    """Return the columns that `measure(row numbers, batch)` gives for each batch, in the rows' order.

    The longest rows come first, without `lengths` the first ones; each is read once, unless memory is short. `measure`
    runs in the caller's gradient mode. It may return no columns, and must change nothing before it has measured its
    batch, since a batch may be repeated in smaller parts. Where the pass is `shared`, all processes call it, and each
    has all columns but the LARGE ones. `first` is the first batch, if it has been read. `parts` is a folder for the
    columns of finished batches.
    """
    batches = sorted_batches([0] * len(dataset) if lengths is None else lengths, compute.batch_size)
    fills = not shared or distributed.is_first()
    share = distributed.share(batches) if shared else batches
    columns: dict[str, np.ndarray] = {}
    sent: list[Columns] = []
    measured = _measured(measure, share, dataset, collate, compute, phase, first if fills else None, parts)

    def fill(rows: np.ndarray, part: Columns) -> None:
        for name, value in part.items():
            if name not in columns:
                columns[name] = empty((len(dataset), *value.shape[1:]), value.dtype)
            columns[name][rows] = value if columns[name].dtype == value.dtype else value.clip(-HALF, HALF)

    def measure_share() -> None:
        for rows, part in measured:
            large = {} if fills else {name: part[name] for name in LARGE if name in part}
            fill(rows, {name: value for name, value in part.items() if name not in large})
            sent.append(large)

    with eval_mode(model), precision(next(model.parameters()).device, compute.autocast, cache=False):
        distributed.together(measure_share) if shared else measure_share()
    if shared and distributed.active():
        own = np.concatenate([np.empty(0, dtype=np.int64), *share])
        small = distributed.gathered((own, {n: x[own] for n, x in columns.items() if n not in LARGE}))
        for rows, part in small:
            fill(rows, part)
        large = _joined(sent) if sent else {}
        sent.clear()
        for part, (rows, _) in zip(distributed.to_first(large), small, strict=False):  # the others get none
            fill(rows, part)
        shapes = {name: (x.shape[1:], x.dtype) for name, x in columns.items() if name in LARGE}
        for name, (shape, dtype) in distributed.from_first(shapes).items():
            columns.setdefault(name, np.empty((0, *shape), dtype))
    return columns


def _measured(
    measure: Callable[[np.ndarray, Batch], Columns],
    share: Sequence[np.ndarray],
    dataset: Dataset,
    collate: Collate,
    compute: Compute,
    phase: str,
    first: Batch | None,
    parts: Path | None,
) -> Iterator[tuple[np.ndarray, Columns]]:
    """Yield the row numbers and columns of finished parts, then those of each batch, and write these as parts."""
    done = 0
    for path in [] if parts is None else sorted(parts.glob("*.safetensors")):
        start, end = map(int, path.stem.split("-"))
        if start == done:  # behind a lost part everything is measured again
            done = end
            yield np.concatenate(share[start:end]), load_file(path)
    ready = [] if first is None or done else [first]
    # The loader draws a seed for its workers, not from the global generator.
    options: dict[str, Any] = {"num_workers": compute.workers, "generator": torch.Generator()}
    options["batch_sampler"] = [rows.tolist() for rows in share[done + len(ready) :]]
    read, splitter = chain(ready, DataLoader(cast(Any, dataset), collate_fn=collate, **options)), BatchSplitter()

    def work(rows: np.ndarray) -> Columns:
        whole = splitter.most is None
        return measure(rows, next(read) if whole else collate([dataset[int(j)] for j in rows]))

    waiting, written = list[Columns](), time.monotonic()
    count, total = sum(map(len, share[:done])), sum(map(len, share))
    if compute.progress is not None and count < total:
        compute.progress(phase, count, total)  # before the first batch
    for end, rows in enumerate(share[done:], start=done + 1):
        part = _joined(splitter.of(rows, work))
        waiting.append(part)
        if parts is None:
            waiting.clear()
        elif time.monotonic() - written >= FLUSH_SECONDS:
            with replacing(parts / f"{end - len(waiting):09}-{end:09}.safetensors") as unfinished:
                save_file(_joined(waiting), unfinished)
            waiting, written = [], time.monotonic()
        yield rows, part
        count += len(rows)
        if compute.progress is not None:
            compute.progress(phase, count, total)


def _joined(parts: Sequence[Columns]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array in memory, or a memory-mapped one in half precision for a large matrix.

    Raises SettingsError if the disk has no room for it: writing beyond the room would kill the process.
    """
    if len(shape) < 2 or int(np.prod(shape)) * dtype.itemsize <= IN_MEMORY:
        return np.empty(shape, dtype=dtype)
    folder, size = tempfile.gettempdir(), 2 * int(np.prod(shape))
    if size > (free := shutil.disk_usage(folder).free):
        raise SettingsError(
            f"{shape[0]:,} rows of {shape[1]:,} numbers need {size / 2**20:,.0f} MiB in {folder}, which has "
            f"{free / 2**20:,.0f}; set TMPDIR to a folder on a larger disk"
        )
    with tempfile.TemporaryFile() as file:  # the map holds it open
        return np.memmap(file, dtype=np.float16, mode="w+", shape=shape)


def parts_of(model: nn.Module, compute: Compute, *values: Any, batches: Iterable[Batch] = ()) -> Path | None:
    """Return the folder for the finished parts of a pass, named by all that its numbers depend on.

    These are the model's weights, `values` and the tensors of `batches`; None where the pass keeps no parts.
    """
    if compute.parts is None:
        return None
    named = [*model.named_parameters(), *model.named_buffers()]
    own = (torch.__version__, str(named[0][1].device), distributed.share(range(1024)))
    digest = hashlib.sha256(repr((*values, compute.batch_size, str(compute.autocast), *own)).encode())
    for name, tensor in chain(named, *(sorted(batch.items()) for batch in batches)):
        if isinstance(tensor, Tensor):  # of a batch also what the model does not take
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for part in plain_parts(tensor.detach()):
                digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    folder = compute.parts / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
