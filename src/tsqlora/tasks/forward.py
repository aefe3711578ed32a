"""What a batch is to a model: its inputs, its labels, its logits, and the task they make."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationMixin

from tsqlora.errors import DataError, UnsupportedError
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.generation import Generation

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]


def split_labels(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs and the labels, on the model's device."""
    if "labels" not in batch:
        raise DataError(f"the collator's batches have no 'labels', only {', '.join(sorted(batch))}")
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    return inputs, inputs.pop("labels")


def each_its_row(collate: Collate) -> Collate:
    """The collator; a batch in which samples share rows (packed, or without padding) raises UnsupportedError."""

    def checked(samples: list[Any]) -> Batch:
        batch = collate(samples)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and len(labels) != len(samples):
            raise UnsupportedError(
                f"the collator makes {len(labels)} row(s) of {len(samples)} samples, so that none has numbers of its "
                "own; set packing (or its packing_strategy to 'wrapped') and padding_free off, or score with a "
                "collator that pads"
            )
        return batch

    return checked


def precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to this dtype; None computes as the weights are."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def model_logits(model: nn.Module, inputs: Mapping[str, Tensor], task: Task | None = None) -> Tensor:
    """The model's logits: n × k, never in half precision; of a task that generates n × t × v, as they come."""
    generates = isinstance(task, Generation)
    output = model(**placed(model, inputs, task))
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.dim() != (3 if generates else 2) or logits.shape[0] != next(iter(inputs.values())).shape[0]:
        wanted = "one row for each token of a sample" if generates else "one row a sample"
        raise UnsupportedError(f"the model's logits have shape {tuple(logits.shape)}; {wanted} is needed")
    return logits.float() if not generates and logits.dtype in (torch.float16, torch.bfloat16) else logits


def placed(model: nn.Module, inputs: Mapping[str, Tensor], task: Task | None) -> Mapping[str, Tensor]:
    """To a causal model with the tokens' places, so that a sample is the same on whichever side it is padded."""
    mask = inputs.get("attention_mask")
    causal = isinstance(task, Generation) and task.causal
    if not causal or mask is None or mask.dim() != 2 or "position_ids" in inputs:
        return inputs
    if "position_ids" not in inspect.signature(base_model(model).forward).parameters:
        return inputs
    return {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def base_model(model: nn.Module) -> nn.Module:
    """The model under PEFT's, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def task_of(model: nn.Module) -> Task:
    """What the model is made for: text, where it generates any; else regression for one label, else classification."""
    config = getattr(model, "config", None)
    if isinstance(base_model(model), GenerationMixin):
        return get_task("seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm")
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind == "multi_label_classification":
        return get_task("multi-label-classification")
    regression = kind == "regression" or (kind is None and labels == 1)
    return get_task("regression" if regression else "sequence-classification")
