"""Export the adapter of a run, or any other; a run adds its base model and a model card in the Hub's format."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import GenerationConfig

from tsqlora.adapter.base import Base
from tsqlora.adapter.doctor import serving
from tsqlora.adapter.export import export_adapter
from tsqlora.errors import SettingsError, printable
from tsqlora.files import write_text
from tsqlora.libs.hub import DatasetName, is_hub_id
from tsqlora.libs.transformers import load
from tsqlora.model.load import load_settings
from tsqlora.model.named import trained_task
from tsqlora.record import RunRecord, look_sentences
from tsqlora.rows.readers import SUFFIXES
from tsqlora.run_dir import CONFIG_FILE, adapter_folder, is_run
from tsqlora.settings import Config, load_config
from tsqlora.tasks import get_task
from tsqlora.training.job import labels_of, require_finished, require_trust

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_WHAT = {"merged": "A plain model: base with merged adapter.", "gguf": "A LoRA file for llama.cpp."}


def export(
    source: Path,
    out: Path,
    *,
    format: str,
    base: str | None = None,
    dtype: str | None = None,
    max_rank: int | None = None,
    keep: float | None = None,
) -> dict[str, Any]:
    """Write the adapter of a run or of a directory to `out` with `export_adapter`; return a report for JSON.

    A run knows its base model, and its export gets a model card. For another adapter, logits are compared if `base` is
    given or its weights are needed; else only the base's shapes that the adapter names are read.
    """
    if is_run(source) and base is not None:
        raise SettingsError(f"{source} is a run, which names its base model; remove --base")
    adapter = adapter_folder(source)
    config = load_config(source / CONFIG_FILE, trained=True) if is_run(source) else None
    where = Base(base, compare=base is not None) if config is None else base_of_run(source, config)
    report = export_adapter(adapter, out, format=format, base=where, dtype=dtype, max_rank=max_rank, keep=keep)
    report["serve"] = serving(adapter, out, format)
    if config is not None:
        write_card(source, out, format=format, cut=bool(report["truncation"]))
        report["bytes"] += (out / CARD_FILE).stat().st_size
        if format == "merged" and (packed := config.model.quantization) is not None:
            report["notes"].append(f"trained on a {packed} base, merged into the full one: outputs differ slightly")
    return report


def base_of_run(run: Path, config: Config) -> Base:
    """The base of a run by its settings, without quantisation: merging would round packed weights again."""
    labels = labels_of(require_finished(run))
    require_trust(run, config)
    model, task = config.model, trained_task(config, labels)
    common = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    own, processor = load_settings(model.path, task, labels=labels, **common)
    processors = [processor]
    if not task.reading.head(None):  # no head is new in a model that writes text
        try:
            processors.append(load(GenerationConfig, model.path, revision=model.revision or "main"))
        except OSError:  # as transformers does for a model without this file
            processors.append(GenerationConfig.from_model_config(own))
    return Base(
        model.path,
        setting="model.path",
        revision=model.revision or "main",
        dtype=model.dtype,
        auto=task.reading.auto,
        config=own,
        processors=processors,
        trusted=model.trust_remote_code,
    )


def write_card(run: Path, folder: Path, *, format: str = "peft", cut: bool = False) -> None:
    """Write the run's card beside its weights."""
    write_text(folder / CARD_FILE, model_card(run, format=format, cut=cut))


def model_card(run: Path, *, format: str = "peft", cut: bool = False) -> str:
    """The card of a run's adapter or export: metadata and Markdown.

    The card of an adapter with `cut` ranks has neither ranks nor results, since they are the run's. Paths of this
    machine do not appear: a directory or a file has only its name.
    """
    config, record = load_config(run / CONFIG_FILE, trained=True), RunRecord.load(run)
    if cut:
        record = replace(record, metrics={}, ranks={})
    arguments = json.dumps(_name(config.model.path), ensure_ascii=False)
    for name, value in get_task(record.task).reading.base_arguments(record.labels).items():
        arguments += f", {name}={json.dumps(value)}"
    if config.model.revision is not None:
        arguments += f", revision={json.dumps(config.model.revision)}"
    card = ModelCard.from_template(
        _metadata(config, record, format),
        template_path=str(_TEMPLATE),
        text=_text,
        base=_name(config.model.path),
        data=_name(str(config.data.train)),
        record=record,
        format=format,
        what=_WHAT.get(format, "A LoRA adapter in the format of PEFT."),
        cut=cut,
        kind=get_task(record.task).reading.auto,
        arguments=arguments,  # of `from_pretrained` for the base, as Python
        results=[[s, name, f"{value:.4f}"] for s, values in record.metrics.items() for name, value in values.items()],
        rows=", ".join(f"{count:,} {split}" for split, count in record.plan["rows"].items()),
        labels=", ".join(map(_text, record.labels or ())),
        drawn=_drawn(config, record.quality),
        looks=look_sentences(record.quality),
    )
    return str(card)


def _metadata(config: Config, record: RunRecord, format: str) -> ModelCardData:
    data, base = str(config.data.train), config.model.path
    source = DatasetName.of(data)
    on_hub = _may_be_hub_id(data, source.id)
    results = [
        EvalResult(
            task_type=get_task(record.task).reading.pipeline or record.task,
            dataset_type=source.id if on_hub else _name(data),
            dataset_name=_name(data),
            dataset_config=source.configuration if on_hub else None,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for split, metrics in record.metrics.items()
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        base_model=base if _may_be_hub_id(base, base) else None,
        datasets=[source.id] if on_hub else None,
        library_name="transformers" if format == "merged" else "peft",
        metrics=sorted({metric for metrics in record.metrics.values() for metric in metrics}),
        model_name=_name(base),
        pipeline_tag=get_task(record.task).reading.pipeline,
        tags=["tsqlora", *([] if format == "merged" else ["lora"])],
        eval_results=results or None,
    )


def _drawn(config: Config, quality: Mapping[str, Any]) -> str:
    """How an epoch's rows were drawn."""
    fraction = quality.get("fraction", 1.0)
    if not quality.get("enabled") and fraction == 1:
        return "every row in each epoch"
    random = f"a random {fraction:.0%} of the rows in each epoch"
    if not quality.get("enabled"):
        return random
    if not quality.get("used"):
        return f"{random}: quality was not used"
    scores = quality.get("scores", {})
    if scores.get("draw") != "even":
        return f"{fraction:.0%} of the rows in each epoch, drawn by quality ({config.quality.preset})"
    if (scores.get("noise") or {}).get("evident"):
        return f"{fraction:.0%} of the rows in each epoch, at random among those whose label seemed right"
    return f"{random}: their quality gave no reason for another draw"


_MARKS = {**{ord(mark): f"\\{mark}" for mark in "\\`[]*"}, ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;"}


def _text(value: Any) -> str:
    """A text on one line, without Markdown or HTML."""
    return printable(" ".join(str(value).split())).translate(_MARKS)


def _may_be_hub_id(name: str, id: str) -> bool:
    """Whether a name with this id may be of the hub, and not of a file that was moved since."""
    return is_hub_id(id) and not Path(name).exists() and Path(name).suffix not in SUFFIXES


def _name(path: str) -> str:
    """A hub id, or the last part of a path."""
    return Path(path).name if Path(path).exists() or path.startswith((".", "/", "~")) else path
