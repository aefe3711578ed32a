"""What a batch is to a model: its inputs, its labels, its logits, and the task they make."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationMixin

from tsqlora.compat.torch import upcast
from tsqlora.compat.transformers import CLASSES_OF
from tsqlora.errors import DataError, UnsupportedError
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]


def split_labels(batch: Batch, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs and the labels, on the model's device.

    The decoder of a model behind an encoder reads the target, one token late. The model makes that of labels; since
    they are taken away it is made here, where the collator has not done it.
    """
    if "labels" not in batch:
        raise DataError(f"the collator's batches have no 'labels', only {', '.join(sorted(batch))}")
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    labels = inputs.pop("labels")
    inner = base_model(model)
    if writes_behind_encoder(inner) and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        make = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
        if make is not None:  # else the model says itself that it lacks them
            inputs["decoder_input_ids"] = make(labels=labels)
    return inputs, labels


def writes_behind_encoder(inner: nn.Module) -> bool:
    """Whether it writes with a decoder of its own what an encoder has read, as T5 and BART do."""
    return isinstance(inner, GenerationMixin) and bool(getattr(inner.config, "is_encoder_decoder", False))


def each_its_row(collate: Collate) -> Collate:
    """The collator; a batch in which samples share rows (packed, or without padding) raises UnsupportedError.

    So do pairs of a chosen and a rejected answer.
    """

    def checked(samples: list[Any]) -> Batch:
        # Copies, for collators that take the labels out of their samples.
        batch = collate([dict(sample) if isinstance(sample, dict) else sample for sample in samples])
        labels = batch.get("labels")
        if labels is None and _is_pair(samples[0]):
            get_task("preference-tuning")
        if isinstance(labels, Tensor) and len(labels) != len(samples):
            raise UnsupportedError(
                f"the collator makes {len(labels)} row(s) of {len(samples)} samples, so that none has numbers of its "
                "own; choose the rows before the trainer is built: dataset = tsqlora.select(model, dataset, "
                "processing_class=tokenizer, trusted=rows, fraction=0.2)"
            )
        return batch

    return checked


def _is_pair(sample: Any) -> bool:
    """Whether it is a row of a preference trainer: a chosen and a rejected answer."""
    begun = {str(name).split("_")[0] for name in sample} if isinstance(sample, Mapping) else set[str]()
    return {"chosen", "rejected"} <= begun


def precision(device: torch.device, dtype: torch.dtype | None, *, cache: bool = True) -> AbstractContextManager[Any]:
    """Autocast to this dtype; None computes as the weights are.

    Where some passes have gradients and others none, do without torch's `cache` of casts: it may keep a weight that was
    cast under no_grad, and use it where gradients are wanted (pytorch issue 112583).
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=cache)


def model_logits(model: nn.Module, inputs: Mapping[str, Tensor], task: Task | None = None) -> Tensor:
    """The model's logits: n × k, never in half precision; of a task that generates n × t × v, as they come."""
    generates = isinstance(task, Generation)
    output = model(**placed(model, inputs, task))
    logits = output_part(output, "logits")
    if logits is None:
        raise UnsupportedError(
            f"the model gives {type(output).__name__} without logits; it must return them, or an output or a dict "
            "with 'logits'"
        )
    if logits.dim() != (3 if generates else 2) or logits.shape[0] != next(iter(inputs.values())).shape[0]:
        wanted = "one row for each token of a sample" if generates else "one row a sample"
        raise UnsupportedError(f"the model's logits have shape {tuple(logits.shape)}; {wanted} is needed")
    return logits if generates else upcast(logits)


def output_part(output: Any, name: str) -> Tensor | None:
    """The logits, or the loss, in what a model gives; a tensor alone is the logits."""
    if isinstance(output, Tensor):
        return output if name == "logits" else None
    part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return part if isinstance(part, Tensor) else None


def require_labels(task: Task, labels: Tensor) -> None:
    """Raises UnsupportedError for labels that are not one class of each sample, where the task is of classes."""
    if isinstance(task, Classification) and labels.dim() > 1:
        get_task("multi-label-classification" if labels.is_floating_point() else "token-classification")


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


def task_of(model: nn.Module, *, label_smoothing: float = 0.0) -> Task:
    """What the model is made for: text, where it generates any; else regression for one label, else classification.

    Raises UnsupportedError naming what else it is made for.
    """
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}
    config, inner = getattr(model, "config", None), base_model(model)
    if isinstance(inner, GenerationMixin):
        return get_task("seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm", **options)
    classes = {made.__name__ for made in type(inner).__mro__}
    for name, known in CLASSES_OF.items():
        if classes & set(known.values()):
            return get_task(name)
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind == "multi_label_classification":
        return get_task("multi-label-classification")
    regression = kind == "regression" or (kind is None and labels == 1)
    return get_task("regression" if regression else "sequence-classification", **options)
