"""The model card of a run, in the Hub's format: what it was made of, how it does, what it cost, how to load it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tsqlora.compat.hub import is_hub_id
from tsqlora.data.rows import READERS
from tsqlora.errors import printable
from tsqlora.files import write_whole
from tsqlora.ranks.places import layer_places
from tsqlora.run.config import Config, load_config
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import CONFIG_FILE

FILE = "README.md"
_PIPELINES = {
    "sequence-classification": "text-classification",
    "regression": "text-classification",
    "causal-lm": "text-generation",
}
_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""By the task's name: the Hub's pipeline, and the class of transformers that loads the model."""


def write_card(run: Path, folder: Path, *, format: str = "peft", cut: bool = False) -> None:
    """Writes the run's card into a directory beside the weights that stand there."""
    write_whole(folder / FILE, model_card(run, format=format, cut=cut))


def model_card(run: Path, *, format: str = "peft", cut: bool = False) -> str:
    """The card of a run's adapter, or of what it was exported as: metadata and Markdown.

    Of one whose ranks were cut since, `cut`, ranks and results are not told: they are not its own.
    Paths of this machine are not told: of a directory or a file only its name.
    """
    config, record = load_config(run / CONFIG_FILE), RunRecord.load(run)
    if cut:
        record = replace(record, metrics={}, ranks={})
    parts = [
        f"# {_text(_name(config.model.path))}, fine-tuned on {_text(_name(str(config.data.train)))}",
        _summary(config, record, format, cut=cut),
        *_section("How to load it", [_loading(config, record, format)]),
        *_section("Results", _table(["rows", "metric", "value"], _results(record))),
        *_section("Data", _data(config, record)),
        *_section("Ranks", _ranks(record.ranks) if format != "merged" else []),
        *_section("Cost", _table(["phase", "seconds", "rows forward", "rows backward", "tokens"], _costs(record))),
        *_section("Made with", [", ".join(f"{name} {version}" for name, version in record.versions.items())]),
    ]
    return f"---\n{_metadata(config, record, format)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(config: Config, record: RunRecord, format: str) -> str:
    data, base = str(config.data.train), config.model.path
    results = [
        EvalResult(
            task_type=_PIPELINES.get(record.task, record.task),
            dataset_type=_name(data),
            dataset_name=_name(data),
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for split, metrics in record.metrics.items()
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        base_model=base if _of_the_hub(base) else None,
        datasets=[data] if _of_the_hub(data) else None,
        library_name="transformers" if format == "merged" else "peft",
        metrics=sorted({metric for metrics in record.metrics.values() for metric in metrics}),
        model_name=_name(base),
        pipeline_tag=_PIPELINES.get(record.task),
        tags=["tsqlora", *([] if format == "merged" else ["lora"])],
        eval_results=results or None,
    ).to_yaml()


def _summary(config: Config, record: RunRecord, format: str, *, cut: bool) -> str:
    what = {"merged": "A plain model: base and adapter in one.", "gguf": "A LoRA file for llama.cpp."}
    return (
        f"{what.get(format, 'A LoRA adapter in the format of PEFT.')} Task: {_text(record.task)}. Base model: "
        f"{_text(_name(config.model.path))}. {record.parameters.get('trainable', 0):,} parameters were trained."
        + (" Its ranks were cut after training, and nothing was measured since." if cut else "")
    )


def _loading(config: Config, record: RunRecord, format: str) -> str:
    kind = _CLASSES.get(record.task, "AutoModel")
    labels = f", num_labels={len(record.labels or [None])}" if "Classification" in kind else ""
    if config.model.revision is not None:
        labels += f", revision={json.dumps(config.model.revision)}"
    if format == "gguf":
        return "```bash\nllama-cli -m BASE.gguf --lora adapter.gguf\n```"
    if format == "merged":
        return f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("THIS-DIRECTORY")\n```'
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {kind}\n\n"
        f"base = {kind}.from_pretrained({json.dumps(_name(config.model.path), ensure_ascii=False)}{labels})\n"
        'model = PeftModel.from_pretrained(base, "THIS-DIRECTORY")\n```'
    )


def _results(record: RunRecord) -> list[list[str]]:
    return [[split, name, f"{value:.4f}"] for split, values in record.metrics.items() for name, value in values.items()]


def _data(config: Config, record: RunRecord) -> list[str]:
    rows = ", ".join(f"{count:,} {split}" for split, count in record.plan["rows"].items())
    lines = [
        f"{_text(_name(str(config.data.train)))}: {rows} rows; hash `{_text(record.data['hash'])}`, seed {record.seed}."
    ]
    lines.append(f"Trained on {_drawn(config, record.quality)}.")
    if record.labels is not None:
        lines.append(f"Labels: {', '.join(map(_text, record.labels))}.")
    return ["\n".join([*lines, *(f"Note: {_text(note)}." for note in record.notes)])]


def _drawn(config: Config, quality: Mapping[str, Any]) -> str:
    """How an epoch's rows were drawn, once there were scores."""
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
        return f"{fraction:.0%} of the rows in each epoch, at random among those whose label did not seem wrong"
    return f"{random}: their quality gave no reason to draw otherwise"


def _ranks(ranks: Mapping[str, int]) -> list[str]:
    """Ranks by kind of layer and block, as numbers and as bars."""
    cells = {place: ranks[name] for name, place in layer_places(ranks).items()}
    blocks = sorted({block for block, _ in cells}, key=lambda block: int(block or -1))
    rows = []
    for kind in dict.fromkeys(kind for _, kind in cells):
        found = [cells.get((block, kind)) for block in blocks]
        shown = ("" if rank is None else str(rank) for rank in found)
        rows.append([kind, *shown, _bars([rank for rank in found if rank is not None], max(ranks.values()))])
    return _table(["rank in block", *(block or "–" for block in blocks), "plot"], rows)


def _bars(ranks: Sequence[int], most: int) -> str:
    """A bar for each rank, in eighths of the largest; none for rank 0.

    >>> _bars([0, 1, 4, 8], 8)
    '·▁▄█'
    """
    return "".join("·▁▂▃▄▅▆▇█"[math.ceil(8 * rank / max(most, 1))] for rank in ranks)


def _costs(record: RunRecord) -> list[list[str]]:
    return [
        [phase, f"{cost.seconds:.1f}", f"{cost.forward:,}", f"{cost.backward:,}", f"{cost.tokens:,}"]
        for phase, cost in record.cost.items()
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    escaped = [[_text(cell).replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in escaped]


_MARKS = {**{ord(mark): f"\\{mark}" for mark in "\\`[]*"}, ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;"}


def _text(value: Any) -> str:
    """A stranger's text, on one line, as text: neither Markdown nor HTML."""
    return printable(" ".join(str(value).split())).translate(_MARKS)


def _of_the_hub(name: str) -> bool:
    """Whether a name may be a hub id, and not that of a file, which may have been moved since."""
    return is_hub_id(name) and not Path(name).exists() and Path(name).suffix not in READERS


def _name(path: str) -> str:
    """A hub id as it stands; of a path on this machine its last part."""
    return Path(path).name if Path(path).exists() or path.startswith((".", "/", "~")) else path
