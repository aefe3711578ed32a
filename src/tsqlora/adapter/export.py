"""Export an adapter in a server's format, and compare it with its source before it takes its place."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsqlora.adapter import gguf
from tsqlora.adapter.base import Base, attach, module_shapes, tokenizer_among
from tsqlora.adapter.files import CONFIG, new_directory, read_adapter, require_new, write_adapter
from tsqlora.adapter.health import require_finite, vllm_rank
from tsqlora.adapter.lora import LoraAdapter, shared_by_sides, tied_targets
from tsqlora.adapter.rewrite import compact, ranks_for, require_fits, spelled_out, truncate, universal
from tsqlora.adapter.verify import (
    NAMES,
    compare_logits,
    compare_updates,
    compare_weights,
    logits,
    logits_of,
    peft_logits,
    relative_gap,
    text_batches,
    why_not_compared,
)
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError, nearest
from tsqlora.libs.transformers import load

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Values of `dtype`, with safetensors' names."""
COMPARED = ("update_difference", "relative_difference", "logits_difference", "largest_logit", "bfloat16")


@dataclass(frozen=True, slots=True)
class Job:
    """Input of an export format: the adapter to write, a directory from which PEFT can load it, and the destination.

    `whole` is the adapter before it was cut; None if it was not. `notes` are for the user.
    """

    source: Path
    adapter: LoraAdapter
    folder: Path
    base: Base
    processors: Sequence[Any]
    dtype: str | None
    whole: LoraAdapter | None = None
    notes: list[str] = field(default_factory=list)

    def load(self, dtype: str | None) -> PreTrainedModel:
        """A fresh base in this precision."""
        return self.base.load(self.adapter, dtype)


def require_format(format: str) -> None:
    """Raise SettingsError for a format that does not exist."""
    if format not in FORMATS:
        raise SettingsError(f"--format {format}: {nearest(format, FORMATS.keys() - {'compressed'})}")


def export_adapter(
    source: Path,
    out: Path,
    *,
    format: str,
    base: Base,
    dtype: str | None = None,
    max_rank: int | None = None,
    keep: float | None = None,
) -> dict[str, Any]:
    """Write the adapter in the directory `source` to a new directory `out`, in one of FORMATS; a report for JSON.

    The export is read back and compared with its source: the update of every layer, and logits if a base is
    available. A difference beyond rounding is an error, and nothing is written.

    The report has ‖ΔW − ΔW'‖ / ‖ΔW‖ of each layer that was cut (truncation), by how much the cut moves a logit at most,
    and differences from the cut adapter; of a merged model in bfloat16 how far its logits are from PEFT's in float32,
    and the base's from the base's, relative. What was not compared is None.

    Args:
        dtype: precision of the export, one of FLOATS; by default the adapter's, or the base's if merged.
        max_rank: first cut every layer to this rank by SVD.
        keep: first cut to this share of the adapter's parameters, with the least loss.

    Raises SettingsError, DataError and UnsupportedError before it writes anything, TsqLoraError if the comparison
    fails.
    """
    require_format(format)
    if format == "compressed" and (max_rank, keep) == (None, None):
        raise SettingsError("--format compressed needs --keep SHARE or --max-rank R")
    if keep is not None and not 0 <= keep <= 1:
        raise SettingsError(f"--keep {keep:g}: give a share of the parameters, from 0 to 1")
    floats = gguf.DTYPES if format == "gguf" else FLOATS
    if dtype is not None and dtype not in floats:
        raise SettingsError(f"--dtype {dtype}: {nearest(dtype, floats)}")
    require_new(out)
    whole = adapter = read_adapter(source)
    require_finite(adapter)
    if adapter.is_zero:
        raise DataError("every update of the adapter is zero, so any export is the base; `tsqlora doctor` says why")
    errors = dict[str, float]()
    if (max_rank, keep) != (None, None):
        ranks = {name: target.rank for name, target in adapter.targets.items()}
        ranks = ranks if keep is None else ranks_for(adapter, keep * adapter.parameters)
        most = adapter.rank if max_rank is None else max(max_rank, 0)
        adapter, errors = truncate(adapter, {name: min(rank, most) for name, rank in ranks.items()})
    with TemporaryDirectory() as loadable, new_directory(out) as folder:
        processors = base.processors_for(adapter, source)
        if errors or not all(target.rank for target in adapter.targets.values()):
            # PEFT cannot load a layer of rank 0.
            source = Path(loadable)
            write_adapter(compact(adapter), source)
        job = Job(source, adapter, folder, base, processors, dtype, whole if errors else None)
        report: dict[str, Any] = {"out": str(out), "format": format} | dict.fromkeys(COMPARED) | FORMATS[format](job)
        template = getattr(tokenizer_among(processors), "chat_template", None)
        if format != "gguf":
            for each in processors:
                each.save_pretrained(folder)
        elif isinstance(template, str):  # llama.cpp has the tokenizer in the base's file
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    job.notes.extend(f"{CONFIG} sets {name}, which tsqlora does not know and leaves out" for name in adapter.ignored)
    lost = report.pop("logits_lost", None)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return report | {"bytes": size, "truncation": errors, "logits_lost": lost, "notes": job.notes}


def _peft(job: Job) -> dict[str, Any]:
    if beyond := [*job.adapter.variants(), *sorted(job.adapter.further)]:
        job.notes.append(f"the adapter has {beyond[0]}: its tensors are copied as they are")
    return _written(job, spelled_out(job.adapter) if beyond else compact(job.adapter))


def _universal(job: Job) -> dict[str, Any]:
    skeleton = job.base.skeleton(job.adapter)
    names = [name for name, _ in skeleton.named_modules()]
    return _written(job, universal(job.adapter, module_shapes(skeleton), names))


def _written(job: Job, export: LoraAdapter) -> dict[str, Any]:
    """Write an adapter in PEFT's format, and compare it."""
    dtype = FLOATS[job.dtype or "float32"]
    if job.dtype is not None:
        targets = {name: replace(target, dtype=dtype) for name, target in export.targets.items()}
        saved, further = ({name: t.to(dtype) for name, t in each.items()} for each in (export.saved, export.further))
        export = replace(export, targets=targets, saved=saved, further=further)
    write_adapter(export, job.folder)
    back = read_adapter(job.folder)
    done = compare_updates(job.adapter, back, dtype).report() | {"rank": back.rank, "targets": len(back.targets)}
    return done | {"max_lora_rank": vllm_rank(back.rank)} | _logits(job, job.folder, dtype)


def _gguf(job: Job) -> dict[str, Any]:
    config, dtype = job.base.skeleton(job.adapter).config, gguf.DTYPES[job.dtype or "float32"]
    gguf.write_gguf(job.adapter, config, job.folder / gguf.FILE, dtype)
    back = gguf.read_gguf(job.folder / gguf.FILE, job.adapter, config)
    done = compare_updates(job.adapter, back, dtype).report() | {"rank": back.rank, "targets": len(back.targets)}
    with TemporaryDirectory() as folder:
        # PEFT runs the adapter that was read back from the file.
        write_adapter(compact(back), Path(folder))
        return done | _logits(job, Path(folder), dtype)


def _logits(job: Job, export: Path, dtype: str) -> dict[str, Any]:
    """Compare logits of the base with the source and with the export, both through PEFT in float32."""
    if not job.base.compare:
        return {}
    model = job.load("float32")
    _require_fit(job.adapter, model)
    if (reference := _reference(job, model)) is None:
        return {}
    del model  # keep one base in memory at a time
    return _compared(job, reference, peft_logits(job.load("float32"), export), dtype)


def _reference(job: Job, model: PreTrainedModel) -> Tensor | None:
    """PEFT's logits of the source; None, with a note, for a model that needs more than tokens."""
    if reason := why_not_compared(model):
        job.notes.append(f"logits not compared, because {reason}")
        return None
    return peft_logits(model, job.source)


def _compared(job: Job, reference: Tensor, export: Tensor, dtype: str) -> dict[str, Any]:
    """The difference of an export's logits from the source's, and of these from those before the cut."""
    gap, size = compare_logits(reference, export, dtype)
    done = {"logits_difference": gap, "largest_logit": size}
    if job.whole is None:
        return done
    with TemporaryDirectory() as folder:
        write_adapter(compact(job.whole), Path(folder))
        before = peft_logits(job.load("float32"), Path(folder))
    return done | {"logits_lost": float((before - reference).abs().max())}


def _merged(job: Job) -> dict[str, Any]:
    model = job.load(job.dtype)
    _require_fit(job.adapter, model)
    half = model.dtype == torch.bfloat16 and why_not_compared(model) is None
    texts = text_batches(model, tokenizer_among(job.processors)) if half else []
    rounded = logits_of(model, texts) if half else None
    save_merged(merge_into(model, job.adapter, job.source), job.folder)
    saved, dtype = load(type(model), job.folder, dtype=model.dtype).eval(), NAMES[model.dtype]
    del model  # keep one base in memory at a time, beside the merged model
    done: dict[str, Any] = {}
    if beyond := [*job.adapter.variants(), *job.adapter.further]:
        job.notes.append(f"the adapter has {beyond[0]}: PEFT merged it, and only logits were compared")
    else:
        done = compare_weights(job.load(job.dtype), saved, job.adapter).report()
    if rounded is not None:
        done |= {"bfloat16": _in_bfloat16(job, rounded, saved, texts, compared=not beyond)}
    # In float32, so that only the rounding of the weights differs.
    if (reference := _reference(job, job.load(job.dtype).float())) is None:
        return done
    return done | _compared(job, reference, logits(saved.float()), dtype)


def _in_bfloat16(
    job: Job, rounded: Tensor, saved: PreTrainedModel, texts: Sequence[Mapping[str, Tensor]], *, compared: bool
) -> dict[str, float]:
    """Compare the merged model with PEFT in float32 as the base in bfloat16 with the base in float32.

    Twice the base's gap is named if the weights were compared; where they were not, it is an error.
    """
    exact = job.load("float32")
    own = relative_gap(rounded, logits_of(exact, texts))
    gap = relative_gap(logits_of(saved, texts), logits_of(attach(exact, job.source), texts))
    if gap > 2 * own:
        what = (
            f"in bfloat16 the merged model's logits differ from PEFT's in float32 by {gap:.2%}, {gap / own:.1f} times "
            "as much as the base's own; serve the adapter, or merge with --dtype float32"
        )
        if not compared:
            raise TsqLoraError(f"{what}; nothing was written")
        job.notes.append(what)
    return {"base": own, "merged": gap}


def _require_fit(adapter: LoraAdapter, model: PreTrainedModel) -> None:
    shapes = module_shapes(model)
    for name, target in adapter.targets.items():
        if target.kind != "convolution":
            require_fits(name, target, shapes)
    there = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in adapter.saved.items():
        if name in there and there[name] != tensor.shape:
            own, base = ("×".join(map(str, shape)) for shape in (tensor.shape, there[name]))
            raise SettingsError(
                f"the adapter came with {name} of shape {own}, but the base has {base}; if the vocabulary was enlarged "
                "before training (resize_token_embeddings), save that base and set --base to it"
            )


def merge_into(base: PreTrainedModel, adapter: LoraAdapter, folder: Path) -> PreTrainedModel:
    """Merge the adapter of a directory into the base, in place, by PEFT.

    Raises UnsupportedError for a quantised base: merging would round its weights again. Also for what PEFT cannot
    merge: a bias of B on a layer without a bias, and an embedding that encoder and decoder share.
    """
    if getattr(base, "is_quantized", False):
        raise UnsupportedError(
            "the base is quantised, and merging would round it again; use the base that it was made from"
        )
    modules = dict(base.named_modules())
    bare = [name for name in adapter.targets if getattr(modules.get(name), "bias", None) is None]
    if adapter.config.get("lora_bias") and bare:
        raise UnsupportedError(f"the adapter has lora_bias, but {bare[0]} of the base has no bias; serve it with PEFT")
    if both := shared_by_sides(adapter):
        raise UnsupportedError(
            f"the adapter changes {both[0]}, whose weight encoder and decoder share, and a merge would change it "
            "elsewhere, too; serve it with PEFT"
        )
    alone = [head for head in adapter.heads() if head.endswith(("embed_tokens", "lm_head"))]
    if tied_targets(adapter) or (alone and not adapter.config.get("ensure_weight_tying")):
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        if head is not None and head.weight is embedding.weight:  # PEFT adapts only one of them
            head.weight = nn.Parameter(head.weight.detach().clone())
            base.config.tie_word_embeddings = False
    merged = attach(base, folder).merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    return merged


def save_merged(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as transformers does, a classifier with id2label and label2id.

    transformers leaves them out where they are its default for two classes, and text-embeddings-inference does not
    start without them.
    """
    model.save_pretrained(folder)
    if type(model).__name__.endswith("Classification"):
        config: Any = model.config
        names = {"id2label": {str(n): name for n, name in config.id2label.items()}, "label2id": config.label2id}
        path = folder / "config.json"
        whole = json.loads(path.read_text(encoding="utf-8")) | names
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


FORMATS: Mapping[str, Callable[[Job], dict[str, Any]]] = {
    "peft": _peft,
    "universal": _universal,
    "compressed": _peft,  # its ranks are cut before; an older name, which is not offered
    "gguf": _gguf,
    "merged": _merged,
}
"""Each writes job.folder and returns the result; it raises if the export differs from its source."""
