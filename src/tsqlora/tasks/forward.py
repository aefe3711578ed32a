"""Batch to model: inputs, labels, logits, and the task that a model is made for."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from tsqlora.compat.torch import upcast
from tsqlora.compat.transformers import CLASSES_OF, MEDIA_CLASSES
from tsqlora.errors import DataError, UnsupportedError
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.multi_label import MultiLabel
from tsqlora.tasks.preference import CAUSAL, Preference
from tsqlora.tasks.regression import Regression
from tsqlora.tasks.tokens import TokenClassification

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]

SELECT_BEFORE = (
    "select rows before you build the trainer: dataset = tsqlora.select(model, dataset, processing_class=tokenizer, "
    "trusted=rows, fraction=0.2)"
)


def split_labels(batch: Batch, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's inputs and the labels, on the model's device.

    An encoder-decoder shifts labels into decoder inputs; without labels it cannot, so that this function does it where
    the collator has not.
    """
    if "labels" not in batch:
        raise DataError(f"the collator's batches have no 'labels', only {', '.join(sorted(batch))}")
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    labels = inputs.pop("labels")
    inner = base_model(model)
    if is_encoder_decoder(inner) and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        make = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
        if make is not None:  # else the model itself reports what is missing
            inputs["decoder_input_ids"] = make(labels=labels)
    return inputs, labels


def is_encoder_decoder(inner: nn.Module) -> bool:
    """Whether the model generates with a decoder that reads an encoder's output, as T5 and BART do."""
    return isinstance(inner, GenerationMixin) and bool(getattr(inner.config, "is_encoder_decoder", False))


def each_its_row(collate: Collate) -> Collate:
    """Wrap the collator to raise UnsupportedError for packed samples, which share a row, and for preference pairs."""
    return partial(_each_its_row, collate)  # a DataLoader's workers may have to pickle it


def _each_its_row(collate: Collate, samples: list[Any]) -> Batch:
    # Copies, because some collators remove the labels from their samples.
    batch = collate([dict(sample) if isinstance(sample, dict) else sample for sample in samples])
    labels = batch.get("labels")
    columns = {str(name).split("_")[0] for name in samples[0]} if isinstance(samples[0], Mapping) else set[str]()
    if labels is None and {"chosen", "rejected"} <= columns:
        raise UnsupportedError(f"the samples are preference pairs of another library; {SELECT_BEFORE}")
    if isinstance(labels, Tensor) and len(labels) != len(samples):
        raise UnsupportedError(
            f"the collator packs {len(samples)} samples into {len(labels)} row(s), so that samples cannot be told "
            f"apart; {SELECT_BEFORE}"
        )
    return batch


def precision(device: torch.device, dtype: torch.dtype | None, *, cache: bool = True) -> AbstractContextManager[Any]:
    """Autocast to this dtype; None computes in the dtype of the weights.

    Turn off torch's `cache` of casts where only some passes have gradients: it may reuse a weight that was cast under
    no_grad in a pass that needs its gradient (pytorch issue 112583).
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=cache)


def model_logits(model: nn.Module, inputs: Mapping[str, Tensor], task: Task | None = None) -> Tensor:
    """Return the logits, at least in float32: n × k, or n × t × k for tags; for generation in the model's own dtype.

    Those of preference pairs are n × 1: the log-ratio of the two answers minus that of the reference model.
    """
    if isinstance(task, Preference):
        texts = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        logits = model_logits(model, texts, CAUSAL)
        return task.margins(logits, inputs["targets"].flatten(0, 1)) - inputs["reference"]
    generates = isinstance(task, Generation)
    dimensions = 3 if generates or isinstance(task, TokenClassification) else 2
    output = model(**placed(model, inputs, task))
    logits = output_part(output, "logits")
    if logits is None:
        raise UnsupportedError(
            f"the model returns {type(output).__name__} without logits; return a tensor, or an output with 'logits'"
        )
    if logits.dim() != dimensions or logits.shape[0] != next(iter(inputs.values())).shape[0]:
        expected = "(samples, tokens, vocabulary or tags)" if dimensions == 3 else "(samples, classes)"
        raise UnsupportedError(f"the model's logits have shape {tuple(logits.shape)}; return {expected}")
    return logits if generates else upcast(logits)


def output_part(output: Any, name: str) -> Tensor | None:
    """Return this field of a model's output, if it is a tensor; a plain tensor is the logits."""
    if isinstance(output, Tensor):
        return output if name == "logits" else None
    part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return part if isinstance(part, Tensor) else None


def require_labels(task: Task, labels: Tensor) -> None:
    """Raise UnsupportedError for labels of another task: one class per sample, or n × k of 0 and 1."""
    if isinstance(task, Classification) and labels.dim() > 1:
        raise UnsupportedError(
            f"the labels have shape {tuple(labels.shape)}, but the task is {task.name}; for several labels per row set "
            'model.config.problem_type to "multi_label_classification", for tags use AutoModelForTokenClassification'
        )
    if isinstance(task, MultiLabel) and labels.dim() != 2:
        raise UnsupportedError(
            f"the labels have shape {tuple(labels.shape)}, but the task is {task.name}; give 0.0 or 1.0 for each label"
        )


def require_usable(task: Task, logits: Tensor, labels: Tensor, rows: Iterable[Any], kind: str = "row") -> None:
    """Raise DataError naming the first of these rows whose label the loss cannot use: no class, or not finite."""
    if not isinstance(task, Classification | Regression | MultiLabel):
        return
    classes = isinstance(task, Classification)
    wrong = (labels < 0) | (labels >= logits.shape[1]) if classes else ~labels.isfinite().view(len(labels), -1).all(1)
    if not wrong.any():
        return
    first = int(wrong.int().argmax())
    expected = f"the model has classes 0 to {logits.shape[1] - 1}" if classes else "it must be a finite number"
    raise DataError(
        f"{kind} {[*rows][first]} has the label {labels[first].tolist()}, and {expected}; correct it or remove the row"
    )


def placed(model: nn.Module, inputs: Mapping[str, Any], task: Task | None) -> Mapping[str, Any]:
    """Add position ids for a causal model, so that left and right padding give the same result; build no KV cache.

    A position embedding with a padding_idx, as RoBERTa's, numbers the tokens itself, from another number on.
    """
    inner = base_model(model)
    body = inner.base_model if isinstance(inner, PreTrainedModel) else inner
    parameters, of_body = (inspect.signature(part.forward).parameters for part in (inner, body))
    if "use_cache" in parameters or ("use_cache" in of_body and "kwargs" in parameters):
        inputs = {"use_cache": False, **inputs}
    mask = inputs.get("attention_mask")
    causal = isinstance(task, Generation) and task.causal
    if not causal or mask is None or mask.dim() != 2 or "position_ids" in inputs:
        return inputs
    if "position_ids" not in parameters or any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in inner.named_modules()
    ):
        return inputs
    return {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that PEFT wraps, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def task_of(model: nn.Module, *, label_smoothing: float = 0.0) -> Task:
    """Infer the task from the model: generation, else by its problem_type, else regression for one label.

    Raises UnsupportedError naming any other task that the model is made for.
    """
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}
    config, inner = getattr(model, "config", None), base_model(model)
    if isinstance(inner, GenerationMixin):
        return get_task("seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm", **options)
    classes = {cls.__name__ for cls in type(inner).__mro__}
    for name, mapping in CLASSES_OF.items():
        if classes & set(mapping.values()):
            tags = {"tags": tuple(cast(Any, config).id2label.values())} if name == TokenClassification.name else {}
            return get_task(name, **tags, **options)
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind == "multi_label_classification":
        return get_task("multi-label-classification", **options)
    regression = kind == "regression" or (kind is None and labels == 1)
    media = (name for name, mapping in MEDIA_CLASSES.items() if classes & {*_flat(mapping.values())})
    return get_task("regression" if regression else next(media, "sequence-classification"), **options)


def _flat(names: Iterable[Any]) -> Iterator[str]:
    """Class names, some of which are in tuples."""
    for name in names:
        yield from (name if isinstance(name, tuple) else (name,))
