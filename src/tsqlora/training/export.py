"""Export the adapter of a run, or any other; a run adds its base model and a model card."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from tsqlora.adapter.base import Base
from tsqlora.adapter.doctor import serving
from tsqlora.adapter.export import export_adapter
from tsqlora.errors import SettingsError
from tsqlora.libs.transformers import load
from tsqlora.model.load import load_settings
from tsqlora.model.named import trained_task
from tsqlora.run_dir import CONFIG_FILE, adapter_folder, is_run
from tsqlora.settings import Config, load_config
from tsqlora.training.card import FILE as CARD
from tsqlora.training.card import write_card
from tsqlora.training.job import labels_of, require_finished, require_trust


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
    packed = None
    if config is not None:
        write_card(source, out, format=format, cut=bool(report["truncation"]))
        report["bytes"] += (out / CARD).stat().st_size
        packed = config.model.quantization
    if format == "merged" and packed is not None:
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
