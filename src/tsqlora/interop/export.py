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

from tsqlora.compat.transformers import load
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError, nearest
from tsqlora.interop import gguf
from tsqlora.interop.attach import attach
from tsqlora.interop.base import Base, module_shapes, tokenizer_among
from tsqlora.interop.files import CONFIG, new_directory, read_adapter, require_new, write_adapter
from tsqlora.interop.health import require_finite, vllm_rank
from tsqlora.interop.lora import LoraAdapter, shared_by_sides, tied_targets
from tsqlora.interop.rewrite import compact, ranks_for, require_fits, spelled_out, truncate, universal
from tsqlora.interop.verify import (
    NAMES,
    Difference,
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

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Values of `dtype`, with safetensors' names."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export, with its difference from the source.

    Attributes:
        rank, targets: of the written adapter; None for a merged model.
        truncation: ‖ΔW − ΔW'‖ / ‖ΔW‖ of each layer that was cut to a lower rank; `difference` is from the cut adapter.
        logits_lost: by how much the cut moves a logit at most; None without a base.
        notes: for the user.
        bfloat16: of a merged model in bfloat16 how far its logits are from PEFT's in float32, and the base's from the
            base's, relative.
    """

    difference: Difference
    rank: int | None = None
    targets: int | None = None
    truncation: Mapping[str, float] = field(default_factory=dict)
    logits_lost: float | None = None
    notes: tuple[str, ...] = ()
    bfloat16: Mapping[str, float] | None = None

    def report(self, out: Path, format: str) -> dict[str, Any]:
        """A summary for JSON of the export in `out`."""
        difference = self.difference
        compared = difference.layer is not None
        report: dict[str, Any] = {
            "out": str(out),
            "format": format,
            "update_difference": difference.update if compared else None,
            "relative_difference": difference.relative if compared else None,
            "logits_difference": difference.logits,
            "largest_logit": difference.logits_size,
            "bfloat16": self.bfloat16,
        }
        if self.rank is not None:
            report |= {"rank": self.rank, "targets": self.targets}
            if format != "gguf":
                report["max_lora_rank"] = vllm_rank(self.rank)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        cut = {"truncation": dict(self.truncation), "logits_lost": self.logits_lost}
        return report | {"bytes": size, **cut, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Job:
    """Input of an export format: the adapter to write, a directory from which PEFT can load it, and the destination.

    `whole` is the adapter before it was cut; None if it was not.
    """

    source: Path
    adapter: LoraAdapter
    folder: Path
    base: Base
    dtype: str | None
    whole: LoraAdapter | None = None


def require_format(format: str) -> None:
    """Raise SettingsError for a format that does not exist."""
    if format not in FORMATS:
        raise SettingsError(f"--format {format}: {nearest(format, FORMATS)}")


def export_adapter(
    source: Path,
    out: Path,
    *,
    format: str,
    base: Base,
    dtype: str | None = None,
    max_rank: int | None = None,
    mean_rank: float | None = None,
) -> Exported:
    """Write the adapter in the directory `source` to a new directory `out`, in one of FORMATS.

    The export is read back and compared with its source: the update of every layer, and logits if a base is
    available. A difference beyond rounding is an error, and nothing is written.

    Args:
        dtype: precision of the export, one of FLOATS; by default the adapter's, or the base's if merged.
        max_rank: first cut every layer to this rank by SVD.
        mean_rank: cut to the parameters of a uniform LoRA of this rank, with the least loss.

    Raises SettingsError, DataError and UnsupportedError before it writes anything, TsqLoraError if the comparison
    fails.
    """
    require_format(format)
    if format == "compressed" and (max_rank, mean_rank) == (None, None):
        raise SettingsError("--format compressed needs --mean-rank R or --max-rank R")
    floats = gguf.DTYPES if format == "gguf" else FLOATS
    if dtype is not None and dtype not in floats:
        raise SettingsError(f"--dtype {dtype}: {nearest(dtype, floats)}")
    require_new(out)
    whole = adapter = read_adapter(source)
    errors = dict[str, float]()
    require_finite(adapter)
    if (max_rank, mean_rank) != (None, None):
        adapter, errors = truncate(adapter, _ranks(adapter, max_rank, mean_rank))
    with TemporaryDirectory() as loadable, new_directory(out) as folder:
        if errors or not all(target.rank for target in adapter.targets.values()):
            # PEFT cannot load a layer of rank 0.
            source = Path(loadable)
            write_adapter(compact(adapter), source)
        done = FORMATS[format](Job(source, adapter, folder, base, dtype, whole if errors else None))
        if format != "merged":
            _carry(base.processors(), folder, whole=format != "gguf")
    unknown = [f"{CONFIG} sets {name}, which tsqlora does not know and leaves out" for name in adapter.ignored]
    return replace(done, truncation=errors, notes=(*done.notes, *unknown))


def _carry(processors: Sequence[Any], folder: Path, *, whole: bool) -> None:
    """Save the processors beside an adapter; llama.cpp has the tokenizer in the base's file, so the template alone."""
    for each in processors if whole else ():
        each.save_pretrained(folder)
    template = getattr(tokenizer_among(processors), "chat_template", None)
    if isinstance(template, str) and not whole:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _ranks(adapter: LoraAdapter, max_rank: int | None, mean_rank: float | None) -> dict[str, int]:
    ranks = {name: target.rank for name, target in adapter.targets.items()}
    if mean_rank is not None:
        ranks = ranks_for(adapter, mean_rank)
    return ranks if max_rank is None else {name: max(min(rank, max_rank), 0) for name, rank in ranks.items()}


def _peft(job: Job) -> Exported:
    if beyond := [*job.adapter.variants(), *sorted(job.adapter.further)]:
        return _written(
            job, spelled_out(job.adapter), f"the adapter has {beyond[0]}: its tensors are copied as they are"
        )
    return _written(job, compact(job.adapter))


def _universal(job: Job) -> Exported:
    skeleton = job.base.skeleton()
    names = [name for name, _ in skeleton.named_modules()]
    return _written(job, universal(job.adapter, module_shapes(skeleton), names))


def _written(job: Job, export: LoraAdapter, *notes: str) -> Exported:
    """Write an adapter in PEFT's format, and compare it."""
    dtype = FLOATS[job.dtype or "float32"]
    write_adapter(export if job.dtype is None else _cast(export, dtype), job.folder)
    back = read_adapter(job.folder)
    difference = compare_updates(job.adapter, back, dtype)
    return _with_logits(job, Exported(difference, back.rank, len(back.targets), notes=notes), job.folder, dtype)


def _gguf(job: Job) -> Exported:
    config, dtype = job.base.skeleton().config, gguf.DTYPES[job.dtype or "float32"]
    gguf.write_gguf(job.adapter, config, job.folder / gguf.FILE, dtype)
    back = gguf.read_gguf(job.folder / gguf.FILE, job.adapter, config)
    done = Exported(compare_updates(job.adapter, back, dtype), back.rank, len(back.targets))
    with TemporaryDirectory() as folder:
        # PEFT runs the adapter that was read back from the file.
        write_adapter(compact(back), Path(folder))
        return _with_logits(job, done, Path(folder), dtype)


def _with_logits(job: Job, done: Exported, export: Path, dtype: str) -> Exported:
    """Compare logits of the base with the source and with the export, both through PEFT in float32."""
    if not job.base.compare:
        return done
    model = job.base.load("float32")
    _require_fit(job.adapter, model)
    if reason := why_not_compared(model):
        return replace(done, notes=(*done.notes, f"logits not compared, because {reason}"))
    reference = peft_logits(model, job.source)
    del model  # keep one base in memory at a time
    return _compared(job, done, reference, peft_logits(job.base.load("float32"), export), dtype)


def _compared(job: Job, done: Exported, reference: Tensor, export: Tensor, dtype: str) -> Exported:
    """The export with its logits' difference from the reference's, and that of the adapter before it was cut."""
    gap, size = compare_logits(reference, export, dtype)
    done = replace(done, difference=replace(done.difference, logits=gap, logits_size=size))
    if job.whole is None:
        return done
    with TemporaryDirectory() as folder:
        write_adapter(compact(job.whole), Path(folder))
        before = peft_logits(job.base.load("float32"), Path(folder))
    return replace(done, logits_lost=float((before - reference).abs().max()))


def _merged(job: Job) -> Exported:
    base = job.base
    model, processors = base.load(job.dtype), base.processors()
    _require_fit(job.adapter, model)
    half = model.dtype == torch.bfloat16 and why_not_compared(model) is None
    texts = text_batches(model, tokenizer_among(processors)) if half else []
    rounded = logits_of(model, texts) if half else None
    save_merged(merge_into(model, job.adapter, job.source), processors, job.folder)
    saved, dtype = reload(job.folder, model), NAMES[model.dtype]
    del model  # keep one base in memory at a time, beside the merged model
    if beyond := [*job.adapter.variants(), *job.adapter.further]:
        note = f"the adapter has {beyond[0]}: PEFT merged it, and only logits were compared"
        done = Exported(Difference(0.0, 0.0, 0.0, layer=None), notes=(note,))
    else:
        done = Exported(compare_weights(base.load(job.dtype), saved, job.adapter))
    if rounded is not None:
        done = _in_bfloat16(job, done, rounded, saved, texts)
    # In float32, so that only the rounding of the weights differs.
    model = base.load(job.dtype).float()
    if reason := why_not_compared(model):
        return replace(done, notes=(*done.notes, f"logits not compared, because {reason}"))
    reference = peft_logits(model, job.source)
    del model
    return _compared(job, done, reference, logits(saved.float()), dtype)


def _in_bfloat16(
    job: Job, done: Exported, rounded: Tensor, saved: PreTrainedModel, texts: Sequence[Mapping[str, Tensor]]
) -> Exported:
    """Compare the merged model with PEFT in float32 as the base in bfloat16 with the base in float32.

    Twice the base's gap is named, since the weights were compared; where they were not, it is an error.
    """
    exact = job.base.load("float32")
    own = relative_gap(rounded, logits_of(exact, texts))
    gap = relative_gap(logits_of(saved, texts), logits_of(attach(exact, job.source), texts))
    done = replace(done, bfloat16={"base": own, "merged": gap})
    if gap <= 2 * own:
        return done
    what = (
        f"in bfloat16 the merged model's logits differ from PEFT's in float32 by {gap:.2%}, {gap / own:.1f} times as "
        "much as the base's own; serve the adapter, or merge with --dtype float32"
    )
    if done.difference.layer is None:
        raise TsqLoraError(f"{what}; nothing was written")
    return replace(done, notes=(*done.notes, what))


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
        _untie(base)
    merged = attach(base, folder).merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    return merged


def _untie(model: PreTrainedModel) -> None:
    """Give an output layer that shares the embedding's weight its own copy: PEFT adapts only one of them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def save_merged(model: PreTrainedModel, processors: Sequence[Any], folder: Path) -> None:
    """Save a model and its processors as transformers does."""
    for each in (model, *processors):
        each.save_pretrained(folder)
    if type(model).__name__.endswith("Classification"):
        _name_labels(model.config, folder / "config.json")


def _name_labels(config: Any, path: Path) -> None:
    """Write id2label and label2id, which transformers leaves out where they are its default for two classes.

    text-embeddings-inference does not start without them.
    """
    names = {"id2label": {str(number): name for number, name in config.id2label.items()}, "label2id": config.label2id}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | names, indent=2) + "\n", encoding="utf-8")


def reload(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """Load a saved model as the same class in the same precision."""
    kind = type(like)
    return load(kind, folder, dtype=like.dtype if like.dtype.is_floating_point else torch.float32).eval()


def _cast(adapter: LoraAdapter, dtype: str) -> LoraAdapter:
    return replace(
        adapter,
        targets={name: replace(target, dtype=dtype) for name, target in adapter.targets.items()},
        saved={name: tensor.to(dtype) for name, tensor in adapter.saved.items()},
        further={name: tensor.to(dtype) for name, tensor in adapter.further.items()},
    )


FORMATS: Mapping[str, Callable[[Job], Exported]] = {
    "peft": _peft,
    "universal": _universal,
    "compressed": _peft,  # its ranks are cut before
    "gguf": _gguf,
    "merged": _merged,
}
"""Each writes job.folder and returns the result; it raises if the export differs from its source."""
