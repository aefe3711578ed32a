"""Passes over all rows: shared among processes, split to fit memory, and journaled so that they can continue."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_columns
from safetensors.numpy import save_file as save_columns
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tsqlora import distributed
from tsqlora.compat.torch import plain_parts
from tsqlora.errors import SettingsError
from tsqlora.files import replacing, write_json, write_tensors
from tsqlora.gradients.ghost import MeanGradient
from tsqlora.oom import BatchSplitter
from tsqlora.quality.reference import Reference
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import Compute
from tsqlora.tasks.forward import Batch, Collate

IN_MEMORY = 1 << 28
"""Bytes above which a matrix is memory-mapped, in half precision."""
HALF = 6e4
"""Half precision ends at 65,504."""
FLUSH_SECONDS = 5.0
"""The journal may lose this much work."""
MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.safetensors"

Columns = Mapping[str, np.ndarray]
R = TypeVar("R")


def read_batches(
    work: Callable[[np.ndarray, Batch], R],
    batches: Sequence[np.ndarray],
    dataset: Dataset,
    collate: Collate,
    *,
    workers: int,
    first: Batch | None = None,
) -> Iterator[list[R]]:
    """Yield, for every batch of row numbers, the results of `work(row numbers, batch)` of the parts that fit in memory.

    Each row is read once, unless memory is short. `first` is the first batch, if it has been read.
    """
    rest = [batch.tolist() for batch in batches[first is not None :]]
    # The loader draws a seed for its workers, not from the global generator.
    options: dict[str, Any] = {"batch_sampler": rest, "num_workers": workers, "generator": torch.Generator()}
    loader = DataLoader(cast(Any, dataset), collate_fn=collate, **options)
    ready, splitter = chain([] if first is None else [first], loader), BatchSplitter()

    def part(rows: np.ndarray) -> R:
        return work(rows, next(ready) if splitter.most is None else collate([dataset[int(j)] for j in rows]))

    for batch in batches:
        yield splitter.of(batch, part)


def run_batches(
    measure: Callable[[np.ndarray, Batch], Columns],
    batches: Sequence[np.ndarray],
    dataset: Dataset,
    collate: Collate,
    compute: Compute,
    *,
    phase: str,
    journal: "Journal | None",
    first: Batch | None = None,
) -> dict[str, np.ndarray]:
    """Measure every batch of row numbers; return the columns of all rows, complete in the first process.

    Several processes share the batches. Batches in the journal are not measured again. `first`: as in `read_batches`.
    """
    columns: dict[str, np.ndarray] = {}

    def fill(indices: np.ndarray, part: Columns) -> None:
        for name, value in part.items():
            if name not in columns:
                columns[name] = empty((len(dataset), *value.shape[1:]), value.dtype)
            columns[name][indices] = value if columns[name].dtype == value.dtype else value.clip(-HALF, HALF)

    done = 0
    for begin, end, part in () if journal is None else journal.parts():
        fill(np.concatenate(batches[begin:end]), part)
        done = end

    def measure_share() -> list[tuple[np.ndarray, Columns]]:
        share, parts = distributed.share(batches[done:]), list[tuple[np.ndarray, Columns]]()
        count = sum(map(len, batches[:done]))
        total = count + sum(map(len, share))
        ready = first if done == 0 and distributed.is_first() else None
        read = read_batches(measure, share, dataset, collate, workers=compute.workers, first=ready)
        for indices, results in zip(share, read, strict=True):
            part = {name: np.concatenate([result[name] for result in results]) for name in results[0]}
            if journal is not None:
                journal.add(part)
            if distributed.is_first():
                fill(indices, part)
            else:
                parts.append((indices, part))
            count += len(indices)
            if compute.progress is not None:
                compute.progress(phase, count, total)
        return parts

    for parts in distributed.to_first(distributed.together(measure_share)) or ():
        for indices, part in parts:
            fill(indices, part)
    return columns


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


class Journal:
    """The reference and the columns of finished batches in a folder; batches always come in the same order."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        bind(folder, identity)
        self.folder = folder
        self.done = 0
        """Batches whose columns are on disk or waiting."""
        self._waiting: list[Columns] = []
        self._written = time.monotonic()

    def reference(self, device: torch.device) -> Reference | None:
        """Load the reference, if there is one."""
        path = self.folder / REFERENCE_FILE
        if not path.exists():
            return None
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Cloned: tensors in the file start at any byte, and the last bit of a sum depends on the alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
            about = json.loads(file.metadata()["tsqlora"])
        sites = dict.fromkeys(name.split(":", 1)[1] for name in tensors if ":" in name)
        mean = {site: MeanGradient(tensors.get(f"weight:{site}"), tensors.get(f"bias:{site}")) for site in sites}
        return Reference(mean=mean, offsets=tensors.get("offsets"), **about)

    def save_reference(self, reference: Reference) -> None:
        tensors = {} if reference.offsets is None else {"offsets": reference.offsets}
        for site, mean in reference.mean.items():
            parts = {f"weight:{site}": mean.weight, f"bias:{site}": mean.bias}
            tensors |= {name: tensor for name, tensor in parts.items() if tensor is not None}
        about = {"norm": reference.norm, "eta": reference.eta, "rows": reference.rows}
        write_tensors(self.folder / REFERENCE_FILE, tensors, {"tsqlora": json.dumps(about)})

    def parts(self) -> Iterable[tuple[int, int, Columns]]:
        """Yield (first batch, end, columns) from batch 0 on without a gap."""
        for path in sorted(self.folder.glob("batches-*.safetensors")):
            first, end = map(int, path.stem.split("-")[1:])
            if first != self.done:
                raise SettingsError(f"{path} does not follow batch {self.done}; delete {self.folder}")
            self.done = end
            yield first, end, load_columns(path)

    def add(self, columns: Columns) -> None:
        """Append the columns of the next batch; they are on disk within FLUSH_SECONDS."""
        self._waiting.append(columns)
        self.done += 1
        if time.monotonic() - self._written < FLUSH_SECONDS:
            return
        path = self.folder / f"batches-{self.done - len(self._waiting):09}-{self.done:09}.safetensors"
        joined = {name: np.concatenate([part[name] for part in self._waiting]) for name in columns}
        with replacing(path) as unfinished:
            save_columns(joined, unfinished)
        self._waiting, self._written = [], time.monotonic()


def bind(folder: Path, identity: Mapping[str, Any]) -> None:
    """Create a folder for the work that `identity`, plain JSON, describes.

    Raises SettingsError where the folder belongs to other work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        write_json(manifest, identity)
        return
    present, required = json.loads(manifest.read_text(encoding="utf-8")), json.loads(json.dumps(identity))
    other = [name for name in required if present.get(name) != required[name]]
    if other:
        raise SettingsError(
            f"{folder} has an unfinished scoring with other {', '.join(other)}; delete it, or name another --out"
        )


def identity_of(
    model: nn.Module,
    hashes: Sequence[str],
    lengths: Sequence[int],
    reference: Iterable[Mapping[str, Tensor]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what must be equal for a scoring to continue: rows, their lengths in tokens, which also order the batches,
    reference batches, weights, settings, versions."""
    parameters = [*model.named_parameters(), *model.named_buffers()]
    return {
        "rows": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "row lengths": hashlib.sha256(np.asarray(lengths, dtype=np.int64).tobytes()).hexdigest(),
        "reference rows": _digest(pair for batch in reference for pair in sorted(batch.items())),
        "weights": _digest(parameters),
        "settings": {name: settings[name] for name in sorted(settings)},
        "torch": torch.__version__,
        "device": str(parameters[0][1].device),
    }


def _digest(tensors: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):  # of a batch: the model does not take it
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in plain_parts(tensor.detach()):
            flat = part.cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
