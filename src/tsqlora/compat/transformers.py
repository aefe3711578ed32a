"""What tsqlora needs of transformers that is private or differs between versions."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, trainer_pt_utils
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.models.auto import modeling_auto

SUMS = "loss_is_scaled_for_ga" if hasattr(Trainer, "loss_is_scaled_for_ga") else "model_accepts_loss_kwargs"
"""The Trainer's attribute that keeps it from taking the mean over a step's batches; the second one before 5.21."""


def set_deletion_order(checkpoints: Iterable[Path]) -> None:
    """Makes the Trainer delete these checkpoints in this order, and after them those that it writes later.

    With save_total_limit the Trainer deletes the folder with the oldest date, and trusts dates only where they span a
    second. A clock that was set back would make it delete the newest.
    """
    for second, path in enumerate(checkpoints, start=1):
        os.utime(path, (second, second))


def saved_note(state: TrainerState, key: str) -> dict[str, Any]:
    """A dict of ours in the trainer_state.json of every checkpoint that the Trainer writes from now on; change it."""
    return cast(dict[str, Any], state.stateful_callbacks).setdefault(key, {})


def set_loss_scaling(trainer: Trainer, *, divides_by_window: bool) -> None:
    """Tells the Trainer how a step sums its batches, which it takes from the model's class.

    A loss is the mean over its batch unless the model divides by the tokens of the whole window. Label smoothing
    is the Trainer's own loss, which does divide where it can count.
    """
    smoothed = trainer.label_smoother is not None
    setattr(trainer, SUMS, trainer.model_accepts_loss_kwargs and (smoothed or divides_by_window))


def summed_batches(trainer: Trainer) -> int:
    """Over how many batches the step under way sums the loss; 1 where the Trainer takes their mean."""
    return trainer.current_gradient_accumulation_steps if getattr(trainer, SUMS) else 1


def callbacks_of(trainer: Trainer) -> Sequence[TrainerCallback]:
    """The Trainer's callbacks, in the order in which it calls them."""
    return trainer.callback_handler.callbacks


def reporter_kinds(names: str | list[str] | None) -> tuple[type[TrainerCallback], ...]:
    """The callbacks that `report_to` asks for.  Raises ValueError for an unknown name."""
    return tuple(get_reporting_integration_callbacks(names))


def installed_reporters() -> set[str]:
    return {*get_available_reporting_integrations()}


def was_loaded(parameter: Tensor) -> bool:
    """Whether `from_pretrained` found the parameter in the checkpoint; False for all in a model made otherwise."""
    return getattr(parameter, "_is_hf_initialized", False)


def knows_lengths(sampler: Any) -> bool:
    """Whether a sampler of the Trainer's read the rows' lengths once, when it was made."""
    names = ("LengthGroupedSampler", "DistributedLengthGroupedSampler", "BatchRebalanceSampler")  # the last from 5.x on
    return isinstance(
        sampler, tuple(getattr(trainer_pt_utils, name) for name in names if hasattr(trainer_pt_utils, name))
    )


def packing_method(config: Any) -> str | None:
    """How the weights of a model with this config are quantised: bitsandbytes, gptq, torchao …"""
    made = getattr(config, "quantization_config", None) or {}
    method = made.get("quant_method") if isinstance(made, dict) else made.quant_method
    return None if method is None else str(getattr(method, "value", method))


CLASSES_OF: Mapping[str, Mapping[Any, Any]] = {
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
"""Classes of models by task, and by kind of model."""
