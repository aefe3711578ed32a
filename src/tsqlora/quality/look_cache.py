"""A cache of looks, so that several learning rates, or the trials of a search, pay for one.

Each look is a folder under ~/.cache/tsqlora/looks, named by a hash of its inputs. TSQLORA_CACHE changes the folder; an
empty value turns the cache off. Only the newest looks stay.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tsqlora import distributed
from tsqlora.compat.torch import plain_parts
from tsqlora.errors import TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.cost import PhaseCost
from tsqlora.quality.look import Look, look
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import LookRequest
from tsqlora.quality.scores import ScoreRecord, Scores
from tsqlora.tasks.forward import Batch, Collate, each_its_row

MOST_LOOKS = 16
LARGEST = 1 << 26
"""Largest look to cache, in bytes of scores: a home directory is no place for millions of rows."""
ROWS_AT_ONCE = 64
SUMS = 1024
"""Sums of each frozen weight that go into the hash."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedLook:
    """The scores of a look, and the parameters that it changed."""

    scores: Scores
    parameters: Mapping[str, np.ndarray]
    why_not: str | None
    cost: PhaseCost
    """What the look took, which every run that uses it reports: a comparison must not depend on which came first."""


def look_once(model: nn.Module, request: LookRequest) -> Look:
    """Return a cached `look` at the same model and rows, or take and cache one.

    Looks with a trusted model are never cached, since it depends on the learning rate. The fraction is not part of the
    key: only a gate reads it, and only the trusted model has one.
    """
    task, rows, trusted = request.task, request.rows, request.trusted
    key = None
    if not request.rule.trusting(task, trusted is not None).trusts:
        settings = {**asdict(request.rule), "task": repr(task), "autocast": str(request.compute.autocast)}
        datasets = [request.dataset] if trusted is None else [request.dataset, trusted.rows]
        batches = _batches(datasets, each_its_row(request.collate))
        with eval_mode(model):  # rows may draw random numbers, as augmentation does
            key = distributed.once(lambda: key_of(distributed.unwrapped(model), batches, settings))
    cached = None if key is None else distributed.once(lambda: load(key))
    if cached is not None:
        with torch.no_grad():
            for name, value in cached.parameters.items():
                distributed.unwrapped(model).get_parameter(name).copy_(torch.from_numpy(value))
        record = ScoreRecord.of(cached.scores.record.to_dict() | dict(rows.about))
        hashes = None if rows.hashes is None else tuple(rows.hashes)
        scores = replace(cached.scores, ids=rows.ids, hashes=hashes, record=record)
        return Look(scores, None, cached.why_not, cached.cost, PhaseCost())
    result = look(model, request)
    if key is not None and distributed.is_first():
        save(key, CachedLook(result.scores, _changed(model, result), result.why_not, result.cost))
    return result


def _batches(datasets: Iterable[Dataset], collate: Collate) -> Iterator[Batch]:
    """Yield what the model is given of all rows: it also depends on the collator, its tokenizer and lengths."""
    for dataset in datasets:
        for first in range(0, len(dataset), ROWS_AT_ONCE):
            yield collate([dataset[j] for j in range(first, min(first + ROWS_AT_ONCE, len(dataset)))])


def _changed(model: nn.Module, result: Look) -> dict[str, np.ndarray]:
    """Return the parameters of the fitted head's layers by name."""
    if result.layer is None or result.head is None or not result.head.replaces:
        return {}
    layers = [layer for layer in (result.layer.linear, result.layer.dense) if layer is not None]
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    named = distributed.unwrapped(model).named_parameters()
    return {name: value.detach().float().cpu().numpy() for name, value in named if id(value) in own}


def key_of(model: nn.Module, batches: Iterable[Batch], settings: Mapping[str, Any]) -> str | None:
    """Hash all inputs of a look; None where the cache is off, and for inputs that have no lasting description."""
    if _folder() is None:
        return None
    described = json.dumps([settings, _structure(model)], sort_keys=True, default=repr)
    if " at 0x" in described:
        return None  # a term or task of the user's, of which only the address is known
    digest = hashlib.sha256(_code().encode())
    digest.update(described.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in plain_parts(tensor.detach()):
            digest.update(_bytes(part, whole=tensor.requires_grad))
    for batch in batches:
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                return None
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value, whole=True))
    return digest.hexdigest()[:32]


def load(key: str) -> CachedLook | None:
    """Load a cached look; None where there is none or it is damaged."""
    folder = _folder()
    if folder is None or not (folder / key).is_dir():
        return None
    with suppress(TsqLoraError, OSError, ValueError):
        about = json.loads((folder / key / "look.json").read_text())
        cached = CachedLook(
            Scores.load(folder / key / "scores.parquet"),
            load_file(folder / key / "head.safetensors"),
            about["why_not"],
            PhaseCost(**about["cost"]),
        )
        os.utime(folder / key)
        return cached
    shutil.rmtree(folder / key, ignore_errors=True)
    return None


def save(key: str, look: CachedLook) -> None:
    """Cache a look, unless the disk is full or read-only."""
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
            (unfinished / "look.json").write_text(json.dumps({"why_not": look.why_not, "cost": asdict(look.cost)}))
            unfinished.rename(folder / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        looks = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in looks[:-MOST_LOOKS]:
            shutil.rmtree(path, ignore_errors=True)


def _folder() -> Path | None:
    path = os.environ.get("TSQLORA_CACHE")
    if path == "":
        return None
    return (Path.home() / ".cache" / "tsqlora" if path is None else Path(path)) / "looks"


def _structure(model: nn.Module) -> dict[str, Any]:
    """What decides a model's outputs beside its tensors."""
    config = getattr(model, "config", None)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {
        "modules": repr(model),
        "config": repr(config.to_dict() if isinstance(config, PreTrainedConfig) else config),
        "lora": [[x.active_adapters, x.scaling, x.disable_adapters, x.merged_adapters] for x in layers],
    }


def _code() -> str:
    """Hash the versions of torch and transformers, and the code that a look runs."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    package = Path(__file__).parents[1]
    for path in sorted(path for part in ("quality", "gradients", "tasks") for path in (package / part).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _bytes(tensor: Tensor, *, whole: bool) -> bytes:
    """The bytes of a tensor; without `whole` the sums of its parts as integers, which are exact in any order."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    if not whole and len(raw) > 8 * SUMS:
        end = len(raw) - len(raw) % (8 * SUMS)
        # A copy starts at a multiple of 8 bytes, as int64 must.
        words = (raw[:end].clone() if raw.storage_offset() % 8 else raw[:end]).view(torch.int64)
        return words.view(SUMS, -1).sum(1).cpu().numpy().tobytes() + raw[end:].cpu().numpy().tobytes()
    return raw.cpu().numpy().tobytes()
