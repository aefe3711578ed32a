"""Looks that were taken before: five learning rates, or the trials of a search, pay for one.

Each is a folder under ~/.cache/tsqlora/looks (TSQLORA_CACHE names another place; empty keeps none), named by a hash of
all that decides it. The newest are kept.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.errors import TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.look import Look, look
from tsqlora.quality.rows import Dataset, held
from tsqlora.quality.rule import LookRequest
from tsqlora.quality.score_record import ScoreRecord
from tsqlora.quality.scores import Scores

KEPT = 16
"""Looks."""
LARGEST = 1 << 26
"""Bytes of scores above which a look is not kept: a home directory is no place for millions of rows."""
FROZEN = 1024
"""Numbers of each frozen weight that tell it from another."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptLook:
    """What a look found, and the parameters that it changed."""

    scores: Scores
    parameters: Mapping[str, np.ndarray]
    why_not: str | None


def look_once(model: nn.Module, request: LookRequest) -> Look:
    """What `look` finds, or found before of the same model and rows; where it needs the trusted model it always looks.

    That one depends on the learning rate.  Only a gate reads the fraction, and only the trusted model makes a gate.
    """
    task, rows, trusted = request.task, request.rows, request.trusted
    key = None
    if not request.rule.trusting(task, trusted is not None).trusts:
        decides = {**asdict(request.rule), "task": repr(task), "autocast": str(request.compute.autocast)}
        seen = [request.dataset] if trusted is None else [request.dataset, trusted.rows]
        with eval_mode(model):  # rows may draw random numbers, as augmentation does
            key = distributed.once(lambda: key_of(distributed.unwrapped(model), seen, decides))
    known = None if key is None else distributed.once(lambda: load(key))
    if known is not None:
        with torch.no_grad():
            for name, value in known.parameters.items():
                distributed.unwrapped(model).get_parameter(name).copy_(torch.from_numpy(value))
        record = ScoreRecord.of(known.scores.record.to_dict() | dict(rows.about))
        hashes = None if rows.hashes is None else tuple(rows.hashes)
        scores = replace(known.scores, ids=rows.ids, hashes=hashes, record=record)
        return Look(scores, None, known.why_not, PhaseCost(), PhaseCost())
    found = look(model, request)
    if key is not None and distributed.is_first():
        save(key, KeptLook(found.scores, _changed(model, found), found.why_not))
    return found


def _changed(model: nn.Module, found: Look) -> dict[str, np.ndarray]:
    """The parameters of the head's layers, by their names."""
    if found.layer is None or found.head is None or not found.head.replaces:
        return {}
    layers = [layer for layer in (found.layer.linear, found.layer.dense) if layer is not None]
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    named = distributed.unwrapped(model).named_parameters()
    return {name: value.detach().float().cpu().numpy() for name, value in named if id(value) in own}


def key_of(model: nn.Module, rows: Iterable[Dataset], settings: Mapping[str, Any]) -> str | None:
    """The name of a look at these rows; None where no looks are kept, or a row has no value to hash."""
    if _folder() is None:
        return None
    digest = hashlib.sha256(_code().encode())
    digest.update(json.dumps(settings, sort_keys=True, default=repr).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach(), whole=tensor.requires_grad))
    for dataset in rows:
        for j in range(len(dataset)):
            row = held(dataset[j])
            if row is None:
                return None
            digest.update(repr(row).encode())
    return digest.hexdigest()[:32]


def load(key: str) -> KeptLook | None:
    """The look of that name; None where there is none, or what is there cannot be read."""
    folder = _folder()
    if folder is None or not (folder / key).is_dir():
        return None
    with suppress(TsqLoraError, OSError, ValueError):
        found = KeptLook(
            Scores.load(folder / key / "scores.parquet"),
            load_file(folder / key / "head.safetensors"),
            json.loads((folder / key / "look.json").read_text())["why_not"],
        )
        os.utime(folder / key)
        return found
    shutil.rmtree(folder / key, ignore_errors=True)  # damaged
    return None


def save(key: str, look: KeptLook) -> None:
    """Keep a look; where the disk is full or not to be written, none is kept."""
    folder = _folder()
    columns = [*look.scores.terms.values(), *look.scores.predictions.values()]
    if folder is None or sum(column.nbytes for column in columns) > LARGEST:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
        try:
            look.scores.save(unfinished / "scores.parquet")
            save_file(dict(look.parameters), unfinished / "head.safetensors")
            (unfinished / "look.json").write_text(json.dumps({"why_not": look.why_not}))
            unfinished.rename(folder / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        looks = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in looks[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)


def _folder() -> Path | None:
    named = os.environ.get("TSQLORA_CACHE")
    if named == "":
        return None
    return (Path.home() / ".cache" / "tsqlora" if named is None else Path(named)) / "looks"


def _code() -> str:
    """What tells one version of the code that looks from another."""
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for path in sorted(path for part in ("quality", "gradients", "tasks") for path in (package / part).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _bytes(tensor: Tensor, *, whole: bool) -> bytes:
    flat = tensor.flatten()
    if not whole and len(flat) > FROZEN:
        flat = flat[:: len(flat) // FROZEN]
    return flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
