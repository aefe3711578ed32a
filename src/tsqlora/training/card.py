"""Write the model card of a run in the Hub's format: data, results, and how to load it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tsqlora.errors import printable
from tsqlora.files import write_text
from tsqlora.libs.hub import DatasetName, is_hub_id
from tsqlora.record import RunRecord, look_sentences
from tsqlora.rows.readers import SUFFIXES
from tsqlora.run_dir import CONFIG_FILE
from tsqlora.settings import Config, load_config
from tsqlora.tasks import get_task

FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_WHAT = {"merged": "A plain model: base with merged adapter.", "gguf": "A LoRA file for llama.cpp."}


def write_card(run: Path, folder: Path, *, format: str = "peft", cut: bool = False) -> None:
    """Write the run's card beside its weights."""
    write_text(folder / FILE, model_card(run, format=format, cut=cut))


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
