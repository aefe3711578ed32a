"""Batch to model: inputs, labels, logits."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from tsqlora.errors import DataError, UnsupportedError
from tsqlora.libs.torch import upcast

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
    return generates(inner) and bool(getattr(inner.config, "is_encoder_decoder", False))


def generates(inner: nn.Module) -> bool:
    """Whether the model writes text."""
    return isinstance(inner, GenerationMixin)


def continues(inner: nn.Module) -> bool:
    """Whether the model generates by going on from its input: its logits at a token predict the next one."""
    return generates(inner) and not is_encoder_decoder(inner)


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


def model_logits(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    dimensions: int = 2,
    own_dtype: bool = False,
) -> Tensor:
    """Return the logits, at least in float32 unless in their `own_dtype`: n × k, or n × t × k with 3 `dimensions`."""
    output = model(**placed(model, inputs))
    logits = output_part(output, "logits")
    if logits is None:
        raise UnsupportedError(
            f"the model returns {type(output).__name__} without logits; return a tensor, or an output with 'logits'"
        )
    if logits.dim() != dimensions or logits.shape[0] != next(iter(inputs.values())).shape[0]:
        expected = "(samples, tokens, vocabulary or tags)" if dimensions == 3 else "(samples, classes)"
        raise UnsupportedError(f"the model's logits have shape {tuple(logits.shape)}; return {expected}")
    return logits if own_dtype else upcast(logits)


def output_part(output: Any, name: str) -> Tensor | None:
    """Return this field of a model's output, if it is a tensor; a plain tensor is the logits."""
    if isinstance(output, Tensor):
        return output if name == "logits" else None
    part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return part if isinstance(part, Tensor) else None


def placed(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Build no KV cache; for a decoder that goes on from its input add position ids, so that padding on either side
    gives the same result.

    A position embedding with a padding_idx, as RoBERTa's, numbers the tokens itself, from another number on.
    """
    inner = base_model(model)
    body = inner.base_model if isinstance(inner, PreTrainedModel) else inner
    parameters, of_body = (inspect.signature(part.forward).parameters for part in (inner, body))
    if "use_cache" in parameters or ("use_cache" in of_body and "kwargs" in parameters):
        inputs = {"use_cache": False, **inputs}
    mask = inputs.get("attention_mask")
    if not continues(inner) or mask is None or mask.dim() != 2 or "position_ids" in inputs:
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
