"""LLaMA-Factory with our audit between its preparation and its training."""

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tsqlora.compat.yaml import load_yaml
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.run.prepared_rows import require_findings, without_findings
from tsqlora.run.text_audit import prepared_set

PREPARED, FILTERED, AUDIT = "prepared", "filtered", "audit"


def llamafactory(
    config: Path, out: Path, *, drop: Collection[str] = (), answers: bool = False, train: bool = True
) -> dict[str, Any]:
    """Prepare by LLaMA-Factory's settings, audit, leave out the rows of named findings, and let it train on the others.

    `out` has what was prepared, the audit, and the filtered set that LLaMA-Factory trains on. Raises SettingsError if
    it is not installed, UnsupportedError for another stage than sft.
    """
    if importlib.util.find_spec("llamafactory") is None:
        raise SettingsError("LLaMA-Factory is not installed here; install tsqlora where `llamafactory-cli` runs")
    if out.exists() and any(out.iterdir()):
        raise SettingsError(f"--out {out} is not empty; name another directory")
    require_findings(drop, answers=answers)
    values = load_yaml(config.read_bytes())
    if not isinstance(values, dict):
        raise SettingsError(f"{config} holds no settings of LLaMA-Factory")
    settings: dict[str, Any] = values
    if settings.get("stage") != "sft":
        raise UnsupportedError(f"stage is {settings.get('stage')}; only stage sft is supported")
    if settings.get("tokenized_path"):
        raise SettingsError(f"{config} has a tokenized_path; leave it out, since the filtered set takes its place")
    _prepare(settings | {"tokenized_path": str(out / PREPARED)})
    made = prepared_set(out / PREPARED)
    model = str(settings["model_name_or_path"])
    rows, summary = without_findings(made, model=model, out=out / AUDIT, drop=drop, answers=answers)
    _save(rows, out)
    if train:
        from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

        run_exp(settings | {"tokenized_path": str(out / FILTERED)})
    return {**summary, "tokenized_path": str(out / FILTERED)}


def _prepare(settings: dict[str, Any]) -> None:
    """Let LLaMA-Factory prepare its set, and save it in tokenized_path."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # pyright: ignore[reportMissingImports]
    from llamafactory.hparams import get_train_args  # pyright: ignore[reportMissingImports]
    from llamafactory.model import load_tokenizer  # pyright: ignore[reportMissingImports]

    model, data, training, _, _ = get_train_args(settings)
    tokens = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokens["tokenizer"], data)
    try:
        get_dataset(template, model, data, training, stage="sft", **tokens)
    except SystemExit as ended:  # after saving
        if ended.code:
            raise


def _save(rows: Any, out: Path) -> None:
    """Save the filtered set in the form of the prepared one, with its validation rows."""
    from datasets import DatasetDict, load_from_disk  # seconds to import

    whole = load_from_disk(str(out / PREPARED))
    parts = DatasetDict({**whole, "train": rows}) if isinstance(whole, DatasetDict) else rows
    parts.save_to_disk(str(out / FILTERED))
