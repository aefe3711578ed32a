"""Interfaces of transformers that are private or differ between versions."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, trainer_pt_utils
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.modeling_utils import set_zero3_state as set_zero3_state
from transformers.models.auto import modeling_auto
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

SUMS = "loss_is_scaled_for_ga" if hasattr(Trainer, "loss_is_scaled_for_ga") else "model_accepts_loss_kwargs"
"""The Trainer's attribute that makes it sum a step's batches instead of averaging; the second name before 5.21."""


def set_deletion_order(checkpoints: Iterable[Path]) -> None:
    """Make the Trainer delete these checkpoints in this order, before later ones.

    With save_total_limit the Trainer deletes the folder with the oldest date, and trusts dates only if they span a
    second. After a clock was set back it would delete the newest.
    """
    for second, path in enumerate(checkpoints, start=1):
        os.utime(path, (second, second))


def saved_note(state: TrainerState, key: str) -> dict[str, Any]:
    """A mutable dict that the Trainer writes to trainer_state.json in every later checkpoint."""
    return cast(dict[str, Any], state.stateful_callbacks).setdefault(key, {})


def live_note(state: TrainerState) -> dict[str, Any]:
    """A mutable dict that callbacks share in one training; in no checkpoint.

    `record` has fields for run.json, `files` the names of those that a callback adds to each checkpoint, and `draws`
    the callback that draws the rows.
    """
    return vars(state).setdefault("tsqlora_note", {})


def set_loss_scaling(trainer: Trainer, *, divides_by_window: bool) -> None:
    """Set how the Trainer sums a step's batches, which it infers from the model's class.

    A loss is the mean over its batch unless the model divides by the tokens of the whole window. Label smoothing is
    the Trainer's own loss, which divides if it can count tokens.
    """
    smoothed = trainer.label_smoother is not None
    setattr(trainer, SUMS, trainer.model_accepts_loss_kwargs and (smoothed or divides_by_window))


def set_loss(trainer: Trainer, loss: Callable[[Any, Tensor], Tensor]) -> None:
    """Put the mean loss of a batch, of the model's outputs and the labels, in the place of the model's own."""
    # A Trainer that has no setting for it takes such a loss for divided already.
    divided = SUMS == "loss_is_scaled_for_ga"

    def scaled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        trains = cast(Any, trainer.model).training and not divided
        return loss(outputs, labels) / (trainer.current_gradient_accumulation_steps if trains else 1)

    trainer.compute_loss_func = scaled


def row_collator(trainer: Trainer) -> Callable[[list[Any]], Mapping[str, Any]]:
    """The Trainer's collator, which gets the columns alone that the Trainer would give it."""
    if not trainer.args.remove_unused_columns:
        return trainer.data_collator
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def class_for(auto: Any, config: Any) -> type[PreTrainedModel] | None:
    """The class that AutoModelFor… makes for a config; None for one that it does not support."""
    kind = auto._model_mapping.get(type(config), None)
    return kind[0] if isinstance(kind, tuple) else kind


def load(kind: Any, of: Any, *, trust_remote_code: bool = False, **how: Any) -> Any:
    """Load a config, a tokenizer, a processor or a model of a directory or hub id by its class; or a model's adapter.

    Without trust no code of the model is run. transformers would ask at the terminal, and run it on a "y" there.
    """
    return kind.from_pretrained(of, trust_remote_code=trust_remote_code, **how)


def without_weights(kind: Any, config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model that an AutoModel class makes for a config; code of the model is run as by `load`."""
    return kind.from_config(config, trust_remote_code=trust_remote_code)


def require_no_adapter(path: str, revision: str) -> None:
    """Raise ValueError if a directory or hub id has the settings of an adapter.

    `from_pretrained` of a model would load it with PEFT, which trusts its settings.
    """
    if find_adapter_config_file(path, revision=revision) is not None:
        raise ValueError("it has an adapter_config.json; merge that adapter into its base, or remove the file")


def without_named_files(path: str, **where: Any) -> dict[str, Any]:
    """Arguments of a tokenizer's `from_pretrained` that unset the files named in its tokenizer_config.json.

    transformers 5.2 opens them wherever they are, and `save_pretrained` copies them; without them it takes the files
    beside the config.
    """
    return {name: None for name in get_tokenizer_config(path, **where) if name.endswith("_file")}


def reporter_kinds(names: str | list[str] | None) -> tuple[type[TrainerCallback], ...]:
    """The callbacks of `report_to`.  Raises ValueError for an unknown name."""
    return tuple(get_reporting_integration_callbacks(names))


def installed_reporters() -> set[str]:
    return {*get_available_reporting_integrations()}


def was_loaded(parameter: Tensor) -> bool:
    """Whether `from_pretrained` loaded the parameter from the checkpoint; False in a model made otherwise."""
    return getattr(parameter, "_is_hf_initialized", False)


def knows_lengths(sampler: Any) -> bool:
    """Whether the Trainer's sampler read the rows' lengths at its construction."""
    names = ("LengthGroupedSampler", "DistributedLengthGroupedSampler", "BatchRebalanceSampler")  # the last from 5.x on
    return isinstance(
        sampler, tuple(getattr(trainer_pt_utils, name) for name in names if hasattr(trainer_pt_utils, name))
    )


def packing_method(config: Any) -> str | None:
    """The quantisation method of a model: bitsandbytes, gptq, torchao …"""
    settings = getattr(config, "quantization_config", None) or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return None if method is None else str(getattr(method, "value", method))


CLASSES_OF: Mapping[str, Mapping[Any, Any]] = {
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
"""Model classes by task and model type."""

MEDIA_CLASSES: Mapping[str, Mapping[Any, Any]] = {
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
"""The same, for tasks whose models may have any problem_type."""


def transformer_blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The entries of the outermost ModuleLists that hold some of the layers: an encoder's before a decoder's."""
    lists: list[str] = []
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if any(layer.startswith(f"{name}.") for layer in layers):
            lists.append(name)
            blocks += [f"{name}.{entry}" for entry in range(len(module))]
    return blocks
