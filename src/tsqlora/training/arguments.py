"""TrainingArguments as the method needs them."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tsqlora.compat.transformers import installed_reporters, reporter_kinds
from tsqlora.errors import SettingsError

_REPORTERS = {"mlflow", "tensorboard", "wandb"}
"""Reporters that are packages of the same name."""


def hardware_has_bf16() -> bool:
    """Whether bfloat16 is computed by the GPU or processor itself: elsewhere it is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has no such function
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def training_arguments(
    output_dir: Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    eval_batch_size: int,
    bf16: bool,
    seed: int,
    further: dict[str, Any],
    max_steps: int | None = None,
) -> TrainingArguments:
    """TrainingArguments as the method needs them; `further` fields are taken as they are.

    `max_steps` optimizer steps take the place of `epochs` unless None. Rows come in the order of the draw, which holds
    batches of like length already.
    """
    defaults: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 10,
        "disable_tqdm": True,
        # On, the Trainer multiplies a loss by the number of processes that BERT's, being a mean, is not divided by.
        "average_tokens_across_devices": False,
        # Not on Apple's MPS, where nothing was tried; `use_cpu: false` does.
        "use_cpu": not torch.cuda.is_available(),
    }
    _require_reporters(further.get("report_to") or "none")
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=epochs,
            max_steps=-1 if max_steps is None else max_steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=eval_batch_size,
            bf16=bf16,
            seed=seed,
            data_seed=seed,
            train_sampling_strategy="sequential",
            **(defaults | further),
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"training: {error}") from error


def _require_reporters(named: str | list[str]) -> None:
    """Raises SettingsError for a reporter that is unknown or not installed, before anything is loaded."""
    try:
        reporter_kinds(named)
    except ValueError as error:
        raise SettingsError(f"training.report_to: {error}") from None
    names = {named} if isinstance(named, str) else {*named}
    for name in sorted(names & _REPORTERS - installed_reporters()):
        raise SettingsError(f"training.report_to: {name} is not installed; install it with: pip install {name}")
