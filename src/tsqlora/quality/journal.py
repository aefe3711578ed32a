"""What an unfinished scoring has measured so far, in a folder: it goes on from there and gives the same scores."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_columns
from safetensors.numpy import save_file as save_columns
from torch import Tensor, nn

from tsqlora.errors import SettingsError
from tsqlora.files import replacing, write_json, write_tensors
from tsqlora.gradients.ghost import MeanGradient
from tsqlora.quality.reference import Reference

MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.safetensors"
FLUSH_SECONDS = 5.0
"""How much work may be lost."""

Columns = Mapping[str, np.ndarray]


def bind(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes a folder that belongs to one piece of work; `identity` says which, and is plain JSON.

    Raises SettingsError where the folder belongs to another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        write_json(manifest, identity)
        return
    known = json.loads(manifest.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(identity))
    other = [name for name in wanted if known.get(name) != wanted[name]]
    if other:
        raise SettingsError(
            f"{folder} holds an unfinished scoring with other {', '.join(other)}; delete it, or name another --out"
        )


class Journal:
    """The reference and the columns of finished batches; batches are planned before, always in one order."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        bind(folder, identity)
        self.folder = folder
        self.done = 0
        """Batches whose columns are on disk or waiting."""
        self._waiting: list[Columns] = []
        self._written = time.monotonic()

    def reference(self, device: torch.device) -> Reference | None:
        """What was saved of the reference, None if nothing was."""
        path = self.folder / REFERENCE_FILE
        if not path.exists():
            return None
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Cloned: in the file a tensor begins at any byte, and sums depend on the alignment in their last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
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
        """Columns of the batches from one number up to another, from batch 0 on without a gap."""
        for path in sorted(self.folder.glob("batches-*.safetensors")):
            first, end = map(int, path.stem.split("-")[1:])
            if first != self.done:
                raise SettingsError(f"{path} does not follow batch {self.done}; delete {self.folder}")
            self.done = end
            yield first, end, load_columns(path)

    def add(self, columns: Columns) -> None:
        """The columns of the next batch; they are on disk within FLUSH_SECONDS."""
        self._waiting.append(columns)
        self.done += 1
        if time.monotonic() - self._written >= FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        path = self.folder / f"batches-{self.done - len(self._waiting):09}-{self.done:09}.safetensors"
        columns = {name: np.concatenate([part[name] for part in self._waiting]) for name in self._waiting[0]}
        with replacing(path) as unfinished:
            save_columns(columns, unfinished)
        self._waiting, self._written = [], time.monotonic()


def identity_of(
    model: nn.Module, hashes: Sequence[str], reference: Iterable[Mapping[str, Tensor]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be the same for scores to go on: rows, the reference's batches, weights, settings, versions."""
    parameters = [*model.named_parameters(), *model.named_buffers()]
    return {
        "rows": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "reference rows": _digest(pair for batch in reference for pair in sorted(batch.items())),
        "weights": _digest(parameters),
        "settings": {name: settings[name] for name in sorted(settings)},
        "torch": torch.__version__,
        "device": str(parameters[0][1].device),
    }


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
