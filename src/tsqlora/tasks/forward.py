"""What a batch is to a model: its inputs, its labels, its logits, and the task they make."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora.errors import DataError, UnsupportedError
from tsqlora.tasks import Task, get_task

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]


def split_labels(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs and the labels, on the model's device."""
    if "labels" not in batch:
        raise DataError(f"the collator's batches have no 'labels', only {', '.join(sorted(batch))}")
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    return inputs, inputs.pop("labels")


def model_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits, n × k, never in half precision."""
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.dim() != 2 or logits.shape[0] != next(iter(inputs.values())).shape[0]:
        raise UnsupportedError(f"the model's logits have shape {tuple(logits.shape)}; one row a sample is needed")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def task_of(model: nn.Module) -> Task:
    """What the model's config says it does: regression for one label, else classification."""
    config = getattr(model, "config", None)
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind == "multi_label_classification":
        return get_task("multi-label-classification")
    regression = kind == "regression" or (kind is None and labels == 1)
    return get_task("regression" if regression else "sequence-classification")
